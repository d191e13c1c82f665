"""Which errors end in one line, and what it says."""

import errno
import logging
import subprocess
import sys

import pytest
import torch
from conftest import RECIPE, REPOSITORY

from speechbrain_ram.cli.common import command
from speechbrain_ram.data.audio import AudioError
from speechbrain_ram.training.checkpoints import CheckpointError
from speechbrain_ram.training.faults import WorkerError
from speechbrain_ram.training.leaving import Interrupted
from speechbrain_ram.training.steps import NonFiniteError
from speechbrain_ram.utils import one_line_errors, printable


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("lr is 0.\n  Is it\n meant?"), "lr is 0. Is it meant?"),
        (AudioError("'a.wav' is empty."), "'a.wav' is empty."),
        (CheckpointError("none"), "none"),
        (NonFiniteError("10 steps"), "10 steps"),
        (WorkerError("gone"), "gone"),
        (ImportError("needs: pip install x"), "needs: pip install x"),
        (OSError(errno.ENOSPC, "No space"), "[Errno 28] No space"),
        (PermissionError(13, "Permission denied", "/a"), "'/a': Permission"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(SystemExit) as left, one_line_errors("a.py"):
        raise error
    assert left.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"a.py: {line}")
    assert caplog.records[0].exc_info[1] is error  # for OUTPUT/log.txt


@pytest.mark.parametrize(
    "text, said",
    [
        ("Zo\u00eb\t\u65e5\n", "Zo\u00eb\t\u65e5\n"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\bb\x9b", r"a\x08b\x9b"),
        ("\u202egnp.", r"\u202egnp."),
    ],
)
def test_no_terminal_obeys_a_file(text, said, capsys):
    assert printable(text) == said
    with pytest.raises(SystemExit), one_line_errors("a.py"):
        raise ValueError(text)
    assert said.strip() in capsys.readouterr().err

    @command
    def shows():
        return {}, text

    with pytest.raises(SystemExit):
        shows(as_json=False)
    assert capsys.readouterr().out == f"{said}\n"


def test_a_file_name_that_is_no_text_can_be_printed():
    assert printable("\udcff.wav") == r"\udcff.wav"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a size is wrong"),
        TypeError("no"),
        KeyError("a"),
        SystemExit(3),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_line_errors("train.py"):
        raise error


def test_leaving_when_asked_is_no_error():
    with pytest.raises(Interrupted), one_line_errors("train.py"):
        raise Interrupted("SIGTERM")


@pytest.mark.parametrize(
    "options, says",
    [
        ("--precision fp8", "py: --precision: invalid choice: 'fp8' (choose "),
        (
            "--ckpt_interval_minutes x",
            "py: --ckpt_interval_minutes: invalid int value: 'x'.",
        ),
        ("--device tpu9", "--device 'tpu9' cannot be used"),
        ("--marign 0.2", "Is --margin meant?"),
        ("--output_folder /proc/run", "--output_folder '/proc/run' cannot"),
    ],
)
def test_training_says_its_errors_in_one_line(options, says):
    script = REPOSITORY / "train_speaker_embeddings.py"
    done = subprocess.run(
        [sys.executable, script, RECIPE, *options.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("train_speaker_embeddings.py: ") and says in line
    assert "Traceback" not in done.stderr and "usage" not in done.stderr
