"""The benchmarks' own machinery: tables, and what counts as a change."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_inference
import bench_step
import harness
from compare import moved
from harness import Apart, Table, alternate, summary


def test_table_is_written_with_quartiles(tmp_path):
    table = Table("t", "Title", "About.", ["case", "s"], tmp_path)
    table.add("a", 1.5)
    table.note("a", [1.0, 2.0, 4.0])
    table.write()
    assert "| case | s |\n| --- | --- |\n| a | 1.5 |" in (
        tmp_path / "t.md"
    ).read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "t.json").read_text())["numbers"]
    assert numbers == {"a": {"low": 1.5, "median": 2.0, "high": 3.0}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md"]


@pytest.mark.parametrize("there, taken", [(1, 1), (99, 99), (150, 100)])
def test_examples_of_int8(tmp_path, monkeypatch, there, taken):
    monkeypatch.setattr(bench_inference, "read_audio", lambda _: torch.ones(2))
    (tmp_path / "train" / "one").mkdir(parents=True)
    for i in range(there):
        (tmp_path / "train" / "one" / f"{i}.ogg").touch()
    arguments = argparse.Namespace(speech=tmp_path)
    assert len(bench_inference.examples(arguments)) == taken


def test_no_examples_of_int8(tmp_path):
    with pytest.raises(SystemExit, match="no train.*Is it the folder of"):
        bench_inference.examples(argparse.Namespace(speech=tmp_path))


def test_cases_run_by_turns():
    order = []
    seconds = alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2
    )
    assert order == ["a", "b"] * 3  # a warm-up, two rounds
    assert [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ([1.0, 1.05, 1.1], []),  # overlaps
        ([1.12, 1.13, 1.14], ["slower 1.13 x  step: 1 s -> 1.13 s"]),
        ([1.06, 1.07, 1.08], []),  # apart, but by less than 10 %
        ([0.5, 0.5, 0.5], ["faster 2.00 x  step: 1 s -> 0.5 s"]),
    ],
)
def test_what_moved(seconds, expected):
    before = {"machine": "m", "numbers": {"step": summary([0.98, 1.0, 1.02])}}
    now = {"machine": "m", "numbers": {"step": summary(seconds), "new": {}}}
    assert moved(before, now) == expected


def test_another_machine_moves_only_what_moved_more_than_it():
    def table(machine, **medians):
        numbers = {
            k: summary([0.99 * m, m, 1.01 * m]) for k, m in medians.items()
        }
        return {"machine": machine, "numbers": numbers}

    before = table("m", stock=1.0, ours=0.5, other=3.0)
    now = table("n", stock=2.0, ours=1.5, other=6.0)
    first, *rest = moved(before, now)
    assert first.startswith("another machine: m -> n; it takes 2.00 x the time")
    assert rest == ["slower 1.50 x  ours: 0.5 s -> 1.5 s"]
    assert len(moved(before, {**now, "machine": "m"})) == 3
    assert moved(before, table("n", new=1.0)) == []


class Case:
    """Built in a process of its own."""

    device = "cpu"

    def __init__(self, name):
        self.name = name

    def __call__(self):
        if self.name == "broken":
            raise RuntimeError("broken")

    def process(self):
        return self.name, os.getpid()


def test_a_case_in_a_process_of_its_own():
    case = Apart(Case, "a")
    name, pid = case.ask("process")
    assert name == "a" and pid != os.getpid()
    seconds = alternate({"a": case, "b": lambda: None}, 2)
    assert len(seconds["a"]) == 2 and 0 <= min(seconds["a"]) < 1
    case.close()
    broken = Apart(Case, "broken")
    with pytest.raises(EOFError):  # its traceback is on stderr
        broken()


@pytest.mark.parametrize("device, most", [("cpu", 6), ("cuda", 1)])
def test_on_a_gpu_one_training_step_is_held_at_a_time(
    monkeypatch, tmp_path, device, most
):
    """Six of them do not fit into its memory, nor does a batch of 9."""
    held, most_held = set(), []

    class Held:
        def __init__(self, build, channels, batch, on, **options):
            assert on == device
            if batch == 9 and (device == "cpu" or options):
                raise EOFError
            held.add(self)
            most_held.append(len(held))

        def __call__(self):
            return 0.5

        def ask(self, what):
            if what == "operations":
                return 1e9
            return dict.fromkeys(bench_step.Step.STAGES, 0.1)

        def close(self):
            held.remove(self)

    monkeypatch.setattr(bench_step, "Apart", Held)
    monkeypatch.setattr(harness, "Apart", Held)
    monkeypatch.setattr(bench_step, "matrix_product", lambda *_: 1e12)
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "AVX512"
    )
    command = ["bench_step.py", "--device", device, "--output", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", [*command, "--sizes", "full:9", "full:512"]
    )
    bench_step.main()
    stock = device == "cuda"  # of a batch of 9
    assert max(most_held) == most and len(most_held) == 6 + stock and not held
    suffix = "" if device == "cpu" else "-cuda"
    table = (tmp_path / f"step{suffix}.md").read_text(encoding="utf-8")
    assert table.count("| full | 512 |") == 6
    assert table.count("| full | 9 |") == stock
    profile = (tmp_path / f"step_profile{suffix}.md").read_text("utf-8")
    assert profile.count("| full | 512 |") == 2
