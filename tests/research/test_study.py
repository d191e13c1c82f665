"""The study's machinery: plan, halves, records, table; all of it once."""

import itertools
import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import speechbrain as sb
import yaml
from conftest import REPOSITORY
from hyperpyyaml import load_hyperpyyaml

from speechbrain_ram.cli.train import train
from speechbrain_ram.verification.bootstrap import bootstrap, bootstrap_draws
from speechbrain_ram.verification.metrics import eer, min_dcf
from speechbrain_ram.verification.trials import read_trials

sys.path.insert(0, str(REPOSITORY / "research" / "study"))
import report
import run as study
import study_judge
import study_plan as plan
import study_results as results

STUDY = REPOSITORY / "research" / "study"
REPLICATES = 40


def write_grid(folder, **changes):
    content = {
        "recipe": str(
            REPOSITORY
            / "recipes"
            / "SpeechOcean762"
            / "hparams"
            / "ram_resnet34.yaml"
        ),
        "settings": {
            "channels": [16, 16, 16, 16],
            "number_of_epochs": 1,
            "batch_size": 8,
            "crop_seconds": 0.5,
            "num_workers": 0,
            "warmup_steps": 2,
        },
        "options": ["--device", "cpu", "--precision", "fp32"],
        "workers": 1,
        "threads": 1,
        "scale": 30.0,
        "margins": [0.1, 0.3, 0.6],
        "systems": {
            "softmax": {"objective": "softmax"},
            "AM": {"objective": "am"},
            "RAM paper": {"objective": "ram", "form": "paper"},
        },
        "baseline": "AM",
        "search_seeds": [1],
        "final_seeds": [1, 2],
        "replicates": REPLICATES,
        "utterances_per_second": 100,
        "overhead_seconds": 10,
        "training_utterances": 1000,
    }
    content.update(changes)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def grid(tmp_path):
    return plan.read_grid(write_grid(tmp_path))


def made_up(grid, run, seed=0):
    """A record whose EER is 5 + (m - best)^2, best depends on the half."""
    best = {"A": 0.3, "B": 0.1} if run.objective == "am" else {"A": 1, "B": 1}
    rng = np.random.default_rng([run.seed, len(run.system), seed])
    eer = {
        half: 5 + (run.margin - best[half]) ** 2 + 0.01 * run.seed
        for half in plan.HALVES
    }
    return {
        "grid": grid.fingerprint,
        **{key: getattr(run, key) for key in plan.Run.__dataclass_fields__},
        "EER": eer,
        "minDCF(0.01)": {half: eer[half] / 10 for half in eer},
        "draws": {
            metric: {
                half: (eer[half] + rng.normal(0, 0.1, REPLICATES)).tolist()
                for half in eer
            }
            for metric in plan.METRICS
        },
        "classes": 125,
        "training": {"train loss": rng.normal()},
        "cpu_seconds": 3600,
    }


def all_records(grid):
    records = {r: made_up(grid, r) for r in plan.search_runs(grid)}
    for run in plan.final_runs(grid, records):
        records[run] = made_up(grid, run)
    return records


# -- the grids ------------------------------------------------------------


@pytest.mark.parametrize("name, most", [("cpu", 10), ("gpu", 24)])
def test_the_grids_are_whole(name, most):
    grid = plan.read_grid(STUDY / f"{name}.yaml")
    assert grid.recipe.is_file()
    kinds = {(s["objective"], s.get("form")) for s in grid.systems.values()}
    assert len(kinds) == 8 and len(grid.final_seeds) >= 5
    assert min(grid.margins) == 0.1 and max(grid.margins) == 1.0
    assert grid.hours(len(plan.search_runs(grid))) < most


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"baseline": "SVM"}, "baseline is 'SVM'"),
        ({"search_seeds": [3]}, "must be among final_seeds"),
        ({"margin": 1}, r"unknown keys \['margin'\]"),
        ({"systems": {"AM": {"margin": 1}}}, "'AM' has the keys .'margin'."),
    ],
)
def test_a_bad_grid_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        plan.read_grid(write_grid(tmp_path, **changes))


def test_beyond_shares_the_records():
    one, other = (
        plan.read_grid(STUDY / f) for f in ("cpu.yaml", "beyond.yaml")
    )
    assert one.fingerprint == other.fingerprint
    for system, settings in one.systems.items():
        assert other.systems.get(system, settings) == settings


def built_by(grid, tmp_path, systems=None):
    """What the recipe makes of each system's command line."""
    built = {}
    for system in systems or grid.systems:
        run = grid.run(system, grid.margins_of(system)[-1], 1)
        folders = tmp_path, tmp_path / "trials.txt", tmp_path / "out"
        command = study.command_of(grid, run, *folders)
        hparams_file, _, overrides = sb.parse_arguments(command[2:])
        with open(hparams_file, encoding="utf-8") as file:
            built[system] = load_hyperpyyaml(file, overrides), run.margin
    return built


def test_what_a_system_overrides(tmp_path):
    """The recipe takes it, as it takes a command line."""
    built = built_by(plan.read_grid(STUDY / "beyond.yaml"), tmp_path)
    for system, (hparams, margin) in built.items():
        assert hparams["compute_cost"].loss_fn.margin == margin
        schedule = hparams["margin_schedule"]
        assert ("rising" in system) == (schedule(0) != margin)
        assert schedule(4) == margin
    kinds = [h["compute_cost"].loss_fn for h, _ in built.values()]
    assert [k.n_classes for k in kinds if hasattr(k, "n_classes")] == [5994]
    assert [k.sharpness for k in kinds if hasattr(k, "sharpness")] == [3]
    assert [k.hardest for k in kinds if hasattr(k, "hardest")] == [3]


# -- speakers and trials --------------------------------------------------


def test_halves_are_alike(tmp_path):
    table = REPOSITORY / "recipes" / "SpeechOcean762" / "speakers.tsv"
    (tmp_path / "speakers.tsv").write_text(table.read_text())
    rows = [line.split("\t") for line in table.read_text().split("\n")[1:-1]]
    dev = {r[0]: (r[2], int(r[3])) for r in rows if r[1] == "dev"}
    half_of = study_judge.halves(tmp_path, sorted(dev))
    assert half_of == study_judge.halves(tmp_path, sorted(dev, reverse=True))
    groups = {h: [dev[s] for s in dev if half_of[s] == h] for h in "AB"}
    assert len(groups["A"]) == len(groups["B"]) == 20
    women = [sum(g == "f" for g, _ in groups[h]) for h in "AB"]
    children = [sum(age < 16 for _, age in groups[h]) for h in "AB"]
    assert abs(women[0] - women[1]) <= 1
    assert abs(children[0] - children[1]) <= 1


@pytest.fixture
def data_folder(tiny_corpus, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train").symlink_to(tiny_corpus.train_root)
    (folder / "dev").symlink_to(tiny_corpus.test_root)
    return folder


def test_trials_are_all_pairs_within_a_half(data_folder, tmp_path):
    half_of = study_judge.write_study_trials(data_folder, tmp_path / "t.txt")
    trials = read_trials(tmp_path / "t.txt")
    found = {
        (frozenset((trials.enrol_ids[e], trials.test_ids[t])), int(label))
        for e, t, label in zip(
            trials.enrol, trials.test, trials.labels, strict=True
        )
    }
    root = (data_folder / "dev").resolve()
    names = [str(path.relative_to(root)) for path in root.rglob("*.wav")]
    expected = {
        (frozenset(pair), int(len({n.split("/")[0] for n in pair}) == 1))
        for pair in itertools.combinations(names, 2)
        if len({half_of[n.split("/")[0]] for n in pair}) == 1
    }
    assert found == expected and len(trials.labels) == len(expected)


def test_judging_two_equal_halves(tmp_path):
    """The same scores in both halves: one EER, draws of their own."""
    rng = np.random.default_rng(0)
    lines, half_of = [], {}
    utterances = [f"{speaker}/{k}" for speaker in "abcdef" for k in range(4)]
    for first, second in itertools.combinations(utterances, 2):
        label = int(first[0] == second[0])
        score = label + rng.normal(0, 0.6)
        for half in plan.HALVES:
            lines.append(f"{half}{first} {half}{second} {score:.6f} {label}")
            half_of |= {half + first[0]: half, half + second[0]: half}
    rng.shuffle(lines)
    (tmp_path / "scores.txt").write_text("\n".join(lines) + "\n")
    found = study_judge.judge(tmp_path / "scores.txt", half_of, 30)
    scores = [float(line.split()[2]) for line in lines if line[0] == "A"]
    labels = [int(line.split()[3]) for line in lines if line[0] == "A"]
    expected = {"EER": eer(scores, labels)}
    expected["minDCF(0.01)"] = min_dcf(scores, labels, p_target=0.01)
    for metric in plan.METRICS:
        for half in plan.HALVES:
            assert found[metric][half] == pytest.approx(
                expected[metric], abs=1e-4
            )
            assert len(found["draws"][metric][half]) == 30
    assert found["draws"]["EER"]["A"] != found["draws"]["EER"]["B"]


def test_draws_are_those_of_the_intervals():
    rng = np.random.default_rng(0)
    speakers = np.repeat(list("abcdefghijkl"), 4)
    i, j = np.triu_indices(len(speakers), 1)
    labels = (speakers[i] == speakers[j]).astype(int)
    scores = labels + rng.normal(0, 0.5, len(labels))
    trials = labels, speakers[i], speakers[j]
    draws = bootstrap_draws(scores, *trials, [0.01], 60, seed=3)
    whole = bootstrap(scores, *trials, [0.01], 60, seed=3)
    for metric, worst in (("EER", 100), ("minDCF(0.01)", 1)):
        value = whole[metric].value
        ends = np.clip(results.interval(value, draws[metric]), 0, worst)
        assert ends == pytest.approx([whole[metric].low, whole[metric].high])
    again = bootstrap_draws(-scores, *trials, [0.01], 60, seed=3)
    # the same speakers were drawn: a system turned round errs where it did not
    assert np.corrcoef(again["EER"], draws["EER"])[0, 1] < -0.9


# -- plan and records -----------------------------------------------------


def test_the_plan(grid):
    search = plan.search_runs(grid)
    assert len(search) == len(set(search)) == 1 + 3 + 3
    records = {run: made_up(grid, run) for run in search}
    # The best on A (0.3) is reported on B, and the other way round.
    assert plan.chosen_margins(grid, records, "AM") == {"A": 0.1, "B": 0.3}
    final = plan.final_runs(grid, records)
    assert {r.margin for r in final if r.system == "AM"} == {0.1, 0.3}
    assert {r.margin for r in final if r.system == "RAM paper"} == {0.6}
    left = plan.missing(final, records)
    assert {r.seed for r in left} == {2} and len(left) == 1 + 2 + 1


def test_records_survive_what_happens_to_files(grid, tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    assert plan.read_records(path, grid) == {}
    first, second, third = plan.search_runs(grid)[:3]
    for run in (first, second):
        plan.append_record(path, made_up(grid, run))
    for change in ({"grid": "of another"}, {"system": "of another"}):
        plan.append_record(path, {**made_up(grid, third), **change})
    whole = path.read_text()
    path.write_text(whole + json.dumps(made_up(grid, third))[:50])
    assert set(plan.read_records(path, grid)) == {first, second}
    plan.append_record(path, made_up(grid, third))
    assert path.read_text().startswith(whole)
    assert set(plan.read_records(path, grid)) == {first, second, third}
    path.write_text("no JSON\n" + whole)
    with pytest.raises(ValueError, match="line 1 is not a record: 'no JSON'"):
        plan.read_records(path, grid)


# -- the table ------------------------------------------------------------


def test_the_table_against_loops(grid):
    records = all_records(grid)
    one = results.result(grid, records, "AM")
    assert one.n_seeds == 2 and one.chosen == {"A": 0.1, "B": 0.3}
    expected = np.mean(
        [
            records[grid.run("AM", margin, seed)]["EER"][half]
            for half, margin in (("A", 0.1), ("B", 0.3))
            for seed in (1, 2)
        ]
    )
    assert one.value["EER"] == pytest.approx(expected)
    assert one.by_seed.mean() == pytest.approx(expected)
    second = [records[grid.run("AM", m, 2)]["EER"] for m in (0.1, 0.3)]
    assert one.by_seed[1] == (second[0]["A"] + second[1]["B"]) / 2
    # every replicate is a mean of one seed pair, on both halves
    for b in range(REPLICATES):
        by_seed = [
            [
                records[grid.run("AM", margin, seed)]["draws"]["EER"][half][b]
                for half, margin in (("A", 0.1), ("B", 0.3))
            ]
            for seed in (1, 2)
        ]
        allowed = [
            np.mean([by_seed[i], by_seed[j]]) for i in (0, 1) for j in (0, 1)
        ]
        assert np.isclose(allowed, one.draws["EER"][b]).any()
    text = results.table(grid, records)
    row = next(r for r in text.split("\n") if r.startswith("| RAM paper"))
    assert "0.6\\*, 0.6\\*" in row and "at the edge of the grid" in text
    paper = results.result(grid, records, "RAM paper")
    value = paper.value["EER"] - one.value["EER"]
    draws = sorted(paper.draws["EER"] - one.draws["EER"])
    low, high = (2 * value - np.quantile(draws, q) for q in (0.975, 0.025))
    assert f"[{low:+.2f}, {high:+.2f}]" in row
    # and with the seeds as they are
    kept = [
        [
            np.mean(
                [
                    records[grid.run(name, m, s)]["draws"]["EER"][half][b]
                    for half, m in margins.items()
                    for s in (1, 2)
                ]
            )
            for b in range(REPLICATES)
        ]
        for name, margins in (("RAM paper", paper.chosen), ("AM", one.chosen))
    ]
    draws = np.subtract(*kept)
    low, high = (2 * value - np.quantile(draws, q) for q in (0.975, 0.025))
    assert row.endswith(f"| [{low:+.2f}, {high:+.2f}] |")
    low, high = sorted(paper.by_seed)
    assert f"| {low:.1f} to {high:.1f} |" in row


def test_luck_is_what_seeds_alone_change(grid):
    """EER is the loss times 2 within a margin; margins differ by far more."""
    records = all_records(grid)
    for run, record in records.items():
        loss = record["training"]["train loss"]
        record["EER"] = dict.fromkeys(plan.HALVES, 2 * loss + 100 * run.margin)
    correlation, n_runs = results.luck(records)
    several = [r for r in records if r.seed == 2]
    assert correlation == pytest.approx(1) and n_runs == 2 * len(several) > 2
    only_first = {r: records[r] for r in records if r.seed == 1}
    assert results.luck(only_first)[1] == 0


def test_an_unfinished_search_is_no_result(grid):
    records = all_records(grid)
    del records[plan.search_runs(grid)[3]]
    with pytest.raises(ValueError, match="1 runs of the search are missing"):
        results.table(grid, records)


def test_fewer_seeds_are_counted(grid):
    records = all_records(grid)
    del records[grid.run("AM", 0.3, 2)]
    assert results.result(grid, records, "AM").n_seeds == 1
    # a difference is of the seeds that both have
    first = results.result(grid, records, "RAM paper", (1,))
    shift, draws = results.difference(grid, records, "RAM paper")
    base = results.result(grid, records, "AM")
    assert first.n_seeds == 1 and len(draws) == REPLICATES
    assert shift == first.value["EER"] - base.value["EER"]
    np.testing.assert_array_equal(draws, first.draws["EER"] - base.draws["EER"])


@pytest.mark.parametrize("name", ["cpu.yaml", "beyond.yaml"])
def test_the_page_shows_what_the_records_say(name):
    grid = plan.read_grid(STUDY / name)
    records = plan.read_records(STUDY / "records" / "cpu.jsonl", grid)
    table = results.table(grid, records)
    assert table in (REPOSITORY / "docs" / "study.md").read_text()
    if name == "cpu.yaml":
        evidence = (REPOSITORY / "docs" / "evidence.md").read_text()
        for row in table.split("\n"):
            if row.startswith("| RAM"):
                assert f"| {row.split(' | ')[6]} |" in evidence


def test_the_pages_less_luck_is_that_of_the_records():
    rates = {}
    lines = (STUDY / "records" / "cpu.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        if record["margin"] == 0.35:
            of_seeds = rates.setdefault(record["system"], {})
            of_seeds[record["seed"]] = statistics.mean(record["EER"].values())
    page = (REPOSITORY / "docs" / "study.md").read_text()
    table = page.partition("## Less luck")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| (RAM.*?) \| (.*?) \| (.*?) \| (.*?) \|$", table, re.M
    )
    assert len(rows) == 3
    for system, *cells in rows:
        each = [rates[system][seed] for seed in sorted(rates[system])]
        assert cells == [
            ", ".join(f"{rate:.2f}" for rate in each),
            f"{statistics.mean(each):.2f}",
            f"{statistics.stdev(each):.2f}",
        ]


def test_figures(grid, tmp_path):
    report.write_figures(grid, all_records(grid), tmp_path / "figures")
    files = sorted(f.name for f in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.png" for name in report.FIGURES)


# -- running --------------------------------------------------------------


def test_launch_measures_and_reports(tmp_path):
    log = tmp_path / "log.txt"
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    seconds = study.launch([sys.executable, "-c", busy], log, 1)
    assert 0.3 <= seconds < 5
    with pytest.raises(RuntimeError, match="status 3, see .*oh dear"):
        wrong = "print('oh dear', flush=True); raise SystemExit(3)"
        study.launch([sys.executable, "-c", wrong], log, 1)


def in_this_process(command, log, threads):
    """A launcher without the seconds that imports take."""
    hparams_file, run_opts, overrides = sb.parse_arguments(list(command[2:]))
    train(hparams_file, run_opts, overrides)
    return 1.0


def test_all_of_it_in_miniature(data_folder, tmp_path):
    """Interrupted in the middle, finished, reported."""
    grid = plan.read_grid(
        write_grid(
            tmp_path,
            margins=[0.2],
            final_seeds=[1],
            systems={
                "AM": {"objective": "am"},
                "RAM hinge": {"objective": "ram", "form": "hinge"},
            },
        )
    )
    records_file = tmp_path / "records.jsonl"
    launched = []

    def fails_at_second(command, log, threads):
        launched.append(command)
        if len(launched) == 2:
            raise RuntimeError("the power went")
        return in_this_process(command, log, threads)

    arguments = grid, data_folder, records_file, tmp_path / "work"
    failures = study.run_study(*arguments, launcher=fails_at_second)
    assert len(failures) == 1 and "the power went" in failures[0]
    assert len(plan.read_records(records_file, grid)) == 1

    assert study.run_study(*arguments, launcher=in_this_process) == []
    records = plan.read_records(records_file, grid)
    assert len(records) == 2
    assert study.run_study(*arguments, launcher=None) == []  # nothing to do

    for run, record in records.items():
        assert record["classes"] == 6
        assert all(0 <= record["EER"][half] <= 100 for half in "AB")
        assert len(record["draws"]["EER"]["A"]) == REPLICATES
        assert record["training"]["train loss"] > 0
        assert record["command"].count(f"--seed {run.seed}") == 1
        assert f"--output_folder WORK/{run.name} " in record["command"]
        assert str(tmp_path) not in record["command"]
        assert str(REPOSITORY) not in record["command"]
        output = tmp_path / "work" / run.name
        assert not (output / "save").exists()
    # each record is of its own training
    assert len({r["training"]["train loss"] for r in records.values()}) == 2
    text = results.table(grid, records)
    assert "| AM | 0.2, 0.2 | 1 |" in text
    assert "2 runs" in study.plan_text(grid, records)


@pytest.mark.slow
def test_the_command(data_folder, tmp_path):
    """As a user types it; a second call finds nothing to do."""
    grid = write_grid(
        tmp_path, margins=[0.2], systems={"AM": {"objective": "am"}}
    )
    records = tmp_path / "records.jsonl"
    command = [sys.executable, str(STUDY / "run.py"), str(data_folder)]
    command += ["--grid", str(grid), "--records", str(records)]
    command += ["--work", str(tmp_path / "work")]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "0 runs are done" in first.stdout
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "2 runs are done; 0 to search, 0 more" in again.stdout
    command = [sys.executable, str(STUDY / "report.py"), str(records)]
    command += ["--grid", str(grid), "--output", str(tmp_path)]
    table = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "| AM | 0.2, 0.2 | 2 |" in table.stdout
    assert (tmp_path / "figures" / "study-margins.png").is_file()
