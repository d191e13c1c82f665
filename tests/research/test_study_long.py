"""The long study: encoders looked at on the way, and what training wears."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_study import (
    REPLICATES,
    STUDY,
    all_records,
    built_by,
    data_folder,  # noqa: F401, a fixture
    in_this_process,
    made_up,
    plan,
    report,
    study,
    write_grid,
)

sys.path.insert(0, str(STUDY))
import study_watch
import study_wear

from speechbrain_ram.verification.metrics import eer
from speechbrain_ram.verification.scores import score_trials, write_scores
from speechbrain_ram.verification.trials import read_trials

EPOCHS = (4, 8, 12)


def test_the_long_grids(tmp_path):
    """One margin a system, a rise over half of the epochs, encoders kept."""
    grids = [plan.read_grid(STUDY / f) for f in ("long.yaml", "long_5994.yaml")]
    assert grids[0].fingerprint == grids[1].fingerprint
    short = plan.read_grid(STUDY / "cpu.yaml")
    epochs = 10 * short.settings["number_of_epochs"]
    same = {**short.settings, "number_of_epochs": epochs}
    assert grids[0].settings == same and not short.watch_every
    seeds = [
        run.seed for run in plan.final_runs(grids[0], all_records(grids[0]))
    ]
    assert seeds == sorted(seeds) and len(seeds) == 3 * len(grids[0].systems)
    for grid, kind in zip(grids, ("rising", "5994"), strict=True):
        systems = [name for name in grid.systems if kind in name]
        assert systems
        built = built_by(grid, tmp_path, systems)
        for system, (hparams, margin) in built.items():
            assert hparams["checkpointer"].every == grid.watch_every
            assert set(hparams["checkpointer"].recoverables) == {
                "embedding_model",
                "epoch_counter",
            }
            loss_fn = hparams["compute_cost"].loss_fn
            assert loss_fn.margin == margin and loss_fn.scale == grid.scale
            many = getattr(loss_fn, "n_classes", None)
            assert ("5994" in system) == (many == 5994)
            schedule = hparams["margin_schedule"]
            half = schedule(epochs / 2 - 1), schedule(epochs / 2)
            assert ("rising" in system) == (half[0] < margin == half[1])


def test_a_watched_system_has_one_margin(tmp_path):
    grid = write_grid(tmp_path, watch_every=4)
    with pytest.raises(ValueError, match="'AM' has the margins .*one is allow"):
        plan.read_grid(grid)


# -- on the way -----------------------------------------------------------


def test_encoders_of_watched_epochs_stay(tmp_path):
    """The others go as ever, checkpoints within an epoch too."""
    save = tmp_path / "save"
    network = torch.nn.Linear(1, 1)
    checkpointer = study_watch.SparingCheckpointer(2, save, {"net": network})
    for epoch in range(1, 8):
        for meta, at_end in (({"within": True}, False), ({}, True)):
            checkpointer.save_and_keep_only(
                {"epoch": epoch, **meta},
                end_of_epoch=at_end,
                ckpt_predicate=lambda c, at_end=at_end: (
                    at_end or "within" in c.meta
                ),
                verbosity=0,
            )
    found = dict(study_watch.watched_checkpoints(tmp_path, 2))
    assert list(found) == [2, 4, 6]
    assert len(list(save.iterdir())) == 3 + 2  # and the newest two
    assert dict(study_watch.watched_checkpoints(tmp_path, 1)).keys() == {
        *found,
        7,
    }


def test_lists_are_judged_as_the_last_epoch_is(data_folder, tmp_path):  # noqa: F811
    """The same rates and replicates as of a training's scores."""
    trials_file, also = tmp_path / "trials.txt", tmp_path / "others"
    half_of = study.write_study_trials(data_folder, trials_file)
    shutil.copytree(data_folder / "dev", also)
    with pytest.raises(ValueError, match="--also is .* has no trials.txt"):
        study_watch.lists_of(data_folder, trials_file, also)
    shutil.copy(trials_file, also)
    lists = study_watch.lists_of(data_folder, trials_file, also)
    names = sorted(read_trials(trials_file).utterances)
    matrix = np.random.default_rng(0).normal(size=(len(names), 4))

    class Encoder:
        def embed(self, paths):
            return matrix[
                [
                    [str(path).endswith(n) for n in names].index(True)
                    for path in paths
                ]
            ]

    found = study_watch.look(Encoder(), lists, REPLICATES)
    everything = read_trials(trials_file)
    scores = score_trials(everything, names, matrix)
    write_scores(everything, scores, tmp_path / "scores.txt")
    expected = study.judge(tmp_path / "scores.txt", half_of, REPLICATES)
    for half in plan.HALVES:
        for metric in plan.METRICS:
            assert found[half][metric] == expected[metric][half]
        assert found[half]["draws"] == expected["draws"]["EER"][half]
    assert set(found) == {"A", "B", "others"}
    whole = eer(scores, everything.labels)
    assert found["others"]["EER"] == pytest.approx(whole, abs=1e-4)


@pytest.mark.slow
def test_a_watched_training(data_folder, tmp_path):  # noqa: F811
    """Interrupted while it is looked at; each epoch is its own encoder."""
    grid = plan.read_grid(
        write_grid(
            tmp_path,
            margins=[0.2],
            final_seeds=[1],
            systems={"AM": {"objective": "am"}},
            watch_every=1,
            settings={
                "channels": [16, 16, 16, 16],
                "number_of_epochs": 3,
                "batch_size": 16,
                "crop_seconds": 0.3,
                "num_workers": 0,
                "warmup_steps": 2,
            },
        )
    )
    also = tmp_path / "others"
    shutil.copytree(data_folder / "dev", also)
    records_file, work = tmp_path / "records.jsonl", tmp_path / "work"
    watching = []

    def launcher(command, log, threads):
        if "study_watch.py" not in command[1]:
            return in_this_process(command, log, threads)
        watching.append(command)
        study_watch.main(command[2:])
        if len(watching) == 1:
            (work / "AM_m0.2_s1" / "watched" / "0002.json").unlink()
            raise RuntimeError("the power went")
        return 1.0

    arguments = grid, data_folder, records_file, work
    study.write_study_trials(data_folder, also / "trials.txt")
    for failures in (1, 0):
        found = study.run_study(*arguments, launcher=launcher, also=also)
        assert len(found) == failures
    record = plan.read_records(records_file, grid)[grid.run("AM", 0.2, 1)]
    points = record["trajectory"]
    assert [point["epoch"] for point in points] == [1, 2, 3]
    for point in points:
        assert set(point["lists"]) == {"A", "B", "others"}
        assert point["training"]["epoch"] == point["epoch"]
        for one in point["lists"].values():
            assert len(one["draws"]) == REPLICATES
    last = points[-1]["lists"]
    for half in plan.HALVES:  # the training's own verification
        assert last[half]["EER"] == pytest.approx(record["EER"][half], abs=0.5)
        assert last[half]["draws"] == pytest.approx(
            record["draws"]["EER"][half], abs=3
        )
    losses = [point["training"]["train loss"] for point in points]
    scores = [json.dumps(point["lists"]) for point in points]
    assert len(set(losses)) == len(set(scores)) == 3
    assert record["cpu_seconds"] == 2
    assert not (work / "AM_m0.2_s1" / "save").exists()


# -- wear -----------------------------------------------------------------


def watched(grid, run, rates, name="others"):
    """A record with these EERs [lists, epochs] of A, B and others."""
    rng = np.random.default_rng(run.seed)
    spread = rng.normal(0, 0.1, (3, REPLICATES))
    points = [
        {
            "epoch": epoch,
            "lists": {
                each: {"EER": float(eer), "draws": (eer + noise).tolist()}
                for each, eer, noise in zip(
                    ("A", "B", name), column, spread, strict=True
                )
            },
        }
        for epoch, column in zip(EPOCHS, np.transpose(rates), strict=True)
    ]
    return {**made_up(grid, run), "trajectory": points}


@pytest.fixture
def grid(tmp_path):
    systems = {
        "AM": {"objective": "am"},
        "RAM hinge": {"objective": "ram", "form": "hinge"},
        "RAM paper": {"objective": "ram"},
    }
    return plan.read_grid(
        write_grid(tmp_path, margins=[0.2], systems=systems, watch_every=4)
    )


@pytest.fixture
def records(grid):
    """AM wears by A's 4 - 3 and B's 6 - 5; the hinge only if B may pick."""
    am, hinge = (
        [grid.run(name, 0.2, seed) for seed in (1, 2)]
        for name in ("AM", "RAM hinge")
    )
    rates = {
        am[0]: [[5, 3, 4], [6, 5, 6], [20, 22, 21]],
        am[1]: [[5, 3, 4], [6, 5, 6], [20, 24, 21]],
        # A picks epoch 4 for B, B picks 12 for A; both together pick 4
        hinge[0]: [[3, 5, 4], [6, 6, 5], [19, 20, 21]],
    }
    return {run: watched(grid, run, each) for run, each in rates.items()}


def test_no_list_judges_what_it_picked(grid, records):
    am = study_wear.course(grid, records, "AM", [1, 2])
    assert am.lists == [study_wear.BOTH, "others"] and am.epochs == EPOCHS
    value, draws = study_wear.wear(am, study_wear.BOTH)
    np.testing.assert_allclose(value, [1, 1])  # epoch 8 on both halves
    np.testing.assert_allclose(draws, 1)  # one and the same speakers
    value, _ = study_wear.wear(am, "others")  # by the halves, not by itself
    np.testing.assert_allclose(value, [21 - 22, 21 - 24])
    hinge = study_wear.course(grid, records, "RAM hinge", [1])
    assert hinge.picked("A") == [2] and hinge.picked("B") == [0]
    value, _ = study_wear.wear(hinge, study_wear.BOTH)
    np.testing.assert_allclose(value, [((4 - 4) + (5 - 6)) / 2])
    value, _ = study_wear.wear(hinge, "others")
    np.testing.assert_allclose(value, [21 - 19])


def test_wear_is_compared_on_common_seeds(grid, records):
    shift, draws = study_wear.more_wear(
        grid, records, "RAM hinge", study_wear.BOTH
    )
    assert shift == -0.5 - 1 and len(draws) == REPLICATES
    np.testing.assert_allclose(draws, -1.5)
    with pytest.raises(ValueError, match="no seed is of 'RAM paper' and 'AM'"):
        study_wear.more_wear(grid, records, "RAM paper", study_wear.BOTH)
    # seeds are drawn: on the others AM wears by -1 and -3
    one = study_wear.course(grid, records, "AM", [1, 2])
    value, draws = study_wear.mean_and_draws(*study_wear.wear(one, "others"))
    assert value == -2 and set(draws.round(6)) == {-1, -2, -3}


def test_a_table_of_what_is_there(grid, records):
    text = study_wear.wear_table(grid, records)
    am, hinge, paper = (
        [line for line in text.split("\n") if line.startswith(f"| {name} ")]
        for name in grid.systems
    )
    assert am[0].startswith("| AM | 0.2 | 2 | 8 | 4.00 | 4.00 | 5.00 [")
    assert am[0].endswith("| +1.00 [+1.00, +1.00] |  |")
    assert hinge[0].startswith("| RAM hinge | 0.2 | 1 | 4 to 12 | 4.50 | 5.00 ")
    assert hinge[0].endswith("-0.50 [-0.50, -0.50] | -1.50 [-1.50, -1.50] |")
    assert "| 4 | 19.00 | 19.00 | 21.00 [" in hinge[1]
    assert paper == ["| RAM paper | 0.2 | 0 |  |  |  |  |  |  |"] * 2
    assert "3 of 6 runs are done, 3.0 CPU hours." in text
    assert study_wear.wear_table(grid, {}).startswith("0 of 6 runs")


def test_lists_that_not_all_have_are_left_out(grid, records):
    run = grid.run("AM", 0.2, 2)
    records[run] = watched(grid, run, np.ones((3, 3)), name="elsewhere")
    one = study_wear.course(grid, records, "AM", [1, 2])
    assert one.lists == [study_wear.BOTH]
    text = study_wear.wear_table(grid, records)
    assert "| AM | 0.2 | 2 |  |  |  |  |  |  |" in text


def test_the_report_of_a_watched_grid(grid, records, tmp_path, monkeypatch):
    """As a user types it, with some records, without any."""
    records_file = tmp_path / "grid.jsonl"
    drawn = tmp_path / "figures" / "grid-epochs.png"
    for part in ({}, records):
        for record in part.values():
            plan.append_record(records_file, record)
        command = ["report.py", str(records_file), "--output", str(tmp_path)]
        command += ["--grid", str(tmp_path / "grid.yaml")]
        monkeypatch.setattr(sys, "argv", command)
        report.main()
        assert drawn.stat().st_size > 5000
        drawn.unlink()


@pytest.mark.parametrize("name", ["long.yaml", "long_5994.yaml"])
def test_the_page_has_the_records_numbers(name):
    grid = plan.read_grid(STUDY / name)
    records = plan.read_records(STUDY / "records" / "long.jsonl", grid)
    page = (REPOSITORY / "docs" / "study-long.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in study_wear.wear_table(grid, records).splitlines()
        if line.startswith("| ") and line.split(" | ")[2] not in ("0", "seeds")
    ]
    assert len(rows) >= 2 * len({run.system for run in records})
    for row in rows:
        assert row in page, row
