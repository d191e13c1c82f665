"""Systems beside their baseline, from records with known effects."""

import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from test_study import STUDY, data_folder, plan, study  # noqa: F401, fixture

sys.path.insert(0, str(STUDY))
import study_effects

from speechbrain_ram.data.synthetic import SYNTHETIC

GRID = plan.read_grid(STUDY / "channels.yaml")


def test_each_addition_is_by_itself():
    for system in GRID.systems:
        overrides = GRID.overrides_of(system)
        assert overrides.get("synthetic", []) == [system] * (
            system in SYNTHETIC
        )
        assert overrides["std_norm"] == (system == "variance")
    assert set(GRID.systems) == {*SYNTHETIC, "plain", "variance"}


def record(eer, other, draws=(0.0, 1.0)):
    """Both halves around `eer`; draws that the systems share."""
    lists = {
        name: {"EER": rate, "draws": [rate + d for d in draws]}
        for name, rate in (("A", eer - 1), ("B", eer + 1), ("alnum70", other))
    }
    return {"trajectory": [{"lists": {}}, {"lists": lists}]}


def made_up(effects):
    return {
        GRID.run(system, GRID.margins[0], seed): record(
            6.0 + effect + 0.2 * seed, 9.0 + 2 * effect
        )
        for system, effect in effects.items()
        for seed in (1, 2)
    }


def test_differences_are_paired():
    """What seeds and speakers do to both is no part of them."""
    records = made_up({"plain": 0.0, "room": -0.5})
    systems = study_effects.by_system(GRID, records)
    for name, expected in (("dev", -0.5), ("alnum70", -1.0)):
        found = study_effects.difference(
            systems["room"], systems["plain"], name
        )
        assert found == pytest.approx((expected,) * 3)


def test_the_interval_is_a_basic_bootstraps():
    draws = np.linspace(-1, 3, 401)
    ours = {1: {"dev": np.array([5.0, *(5.0 + draws)])}}
    base = {1: {"dev": np.full(402, 4.0)}}
    value, low, high = study_effects.difference(ours, base, "dev")
    assert value == 1.0
    assert low == pytest.approx(2 - (1 + 2.9)) and high == pytest.approx(1.9)


def test_the_table(tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    for run, each in made_up({"plain": 0.0, "noise": 0.25}).items():
        about = {key: getattr(run, key) for key in run.__dataclass_fields__}
        plan.append_record(file, {"grid": GRID.fingerprint, **about, **each})
    study_effects.main([str(file)])
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| plain | 2 | 6.30 |  | 6.20 to 6.40 | 9.00 |")
    assert (
        "| noise | 2 | 6.55 | +0.25 [+0.25, +0.25] | 6.45 to 6.65 |" in said[3]
    )
    assert len({line.count("|") for line in said}) == 1


def test_no_baseline(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study_effects.main([str(tmp_path / "none.jsonl")])
    assert "no finished run of 'plain'" in capsys.readouterr().err


def test_a_thinned_corpus(data_folder, tmp_path):  # noqa: F811
    assert study.thinned(data_folder, tmp_path / "all", 0) == data_folder
    few = study.thinned(data_folder, tmp_path / "few", 2)
    for speaker in (data_folder / "train").iterdir():
        names = sorted(p.relative_to(speaker) for p in speaker.rglob("*.wav"))
        kept = few / "train" / speaker.name
        found = sorted(p.relative_to(kept) for p in kept.rglob("*.wav"))
        assert found == names[:2] and all((kept / n).is_file() for n in found)
    assert (few / "dev").resolve() == (data_folder / "dev").resolve()
    assert study.thinned(data_folder, tmp_path / "few", 2) == few  # again


def test_the_recipes_page_has_the_records_numbers():
    records = plan.read_records(STUDY / "records" / "channels.jsonl", GRID)
    page = (REPOSITORY / "recipes" / "SpeechOcean762" / "README.md").read_text(
        encoding="utf-8"
    )
    lines = study_effects.table(GRID, records).splitlines()
    assert len(lines) > 2
    for line in lines[2:]:
        cells = line.split(" | ")
        row = [cells[0], *cells[2:4], *cells[5:7]]
        assert f"{' | '.join(row)} |" in page, row
