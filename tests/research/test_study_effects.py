"""The design of channels.yaml, and what is computed of it."""

import itertools
import sys

import numpy as np
import pytest
from test_study import STUDY, data_folder, plan, study  # noqa: F401, fixture

sys.path.insert(0, str(STUDY))
import study_effects

from speechbrain_ram.data.synthetic import SYNTHETIC

GRID = plan.read_grid(STUDY / "channels.yaml")
ADDITIONS = [*SYNTHETIC, "variance", "speeds"]


def test_each_addition_and_each_pair_are_as_often_there_as_not():
    named = [study_effects.additions_of(system) for system in GRID.systems]
    assert set().union(*named) == set(ADDITIONS) and len(named) == 8
    for name in ADDITIONS:
        assert sum(name in each for each in named) == 4
    for pair in itertools.combinations(ADDITIONS, 2):
        assert sum(set(pair) <= each for each in named) == 2


@pytest.mark.parametrize("system", GRID.systems)
def test_a_system_does_what_its_name_says(system):
    additions = study_effects.additions_of(system)
    overrides = GRID.overrides_of(system)
    assert overrides["std_norm"] == ("variance" in additions)
    distortions = additions - {"variance", "speeds"}
    assert set(overrides.get("synthetic", ())) == distortions
    speeds = overrides.get("speeds", [1.0])
    assert (len(speeds) == 3) == ("speeds" in additions)
    epochs = overrides.get(
        "number_of_epochs", GRID.settings["number_of_epochs"]
    )
    assert epochs * len(speeds) == GRID.settings["number_of_epochs"]


def record(run, rates):
    a, b, other = rates
    lists = {"A": {"EER": a}, "B": {"EER": b}, "alnum70": {"EER": other}}
    return {"trajectory": [{"lists": {}}, {"lists": lists}]}


def test_effects_of_a_sum_are_its_terms():
    """And two seeds 0.2 apart give their standard error."""
    buys = {name: 0.1 * i - 0.3 for i, name in enumerate(ADDITIONS)}
    records = {}
    for system, seed in itertools.product(GRID.systems, (1, 2)):
        run = GRID.run(system, GRID.margins[0], seed)
        rate = 6.0 + sum(map(buys.get, study_effects.additions_of(system)))
        rate += 0.2 * (seed - 1)
        records[run] = record(run, (rate - 1, rate + 1, 10 + 2 * rate))
    found = study_effects.effects(records)
    assert set(found) == set(ADDITIONS)
    # The variance of two values 0.2 apart is 0.02; a side has eight runs.
    error = np.sqrt(0.02 / 8 + 0.02 / 8)
    for name, lists in found.items():
        assert lists["dev"] == pytest.approx((buys[name], error))
        assert lists["alnum70"] == pytest.approx((2 * buys[name], 2 * error))


def test_the_tables(tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    for system in GRID.systems:
        run = GRID.run(system, GRID.margins[0], 1)
        about = {key: getattr(run, key) for key in run.__dataclass_fields__}
        whole = {"grid": GRID.fingerprint, **about}
        plan.append_record(file, {**whole, **record(run, (5.0, 6.0, 9.0))})
    study_effects.main([str(file)])
    said = capsys.readouterr().out
    assert "| plain | 1 | 5.50 | 9.00 |" in said
    assert "| room | +0.00 ± nan | +0.00 ± nan |" in said


def test_no_records(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study_effects.main([str(tmp_path / "none.jsonl")])
    assert "has no finished run of this grid" in capsys.readouterr().err


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
