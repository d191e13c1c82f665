"""What a checkpoint keeps of a running epoch, checked before it is used."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.plain import read_yaml
from speechbrain_ram.training.checkpoint_files import (
    DamagedCheckpoint,
    is_count,
)
from speechbrain_ram.training.checkpoints import CheckpointError
from speechbrain_ram.training.distributed import (
    Tally,
    random_state,
    restore_random_state,
)
from speechbrain_ram.utils import is_number

logger = get_logger(__name__)

Check = Callable[[Any], bool]

#: Attributes of a brain that go on where they were.
COUNTERS = ("optimizer_step", "n_bad_steps", "bad_in_a_row", "n_scaled_down")


def is_number_or_none(value: Any) -> bool:
    """Whether it is a finite number or None."""
    return value is None or is_number(value)


def are_numbers(value: Any) -> bool:
    """Whether it is a dictionary of finite numbers."""
    return isinstance(value, dict) and all(map(is_number, value.values()))


def read_state(
    path: str | os.PathLike, kept: Mapping[str, Check], rank: int
) -> dict[str, Any]:
    """Read what RobustBrain has saved, or (three keys) SpeechBrain's Brain.

    `kept` says which attributes a checkpoint may set, and what they may be.
    The one state of the random generators that is returned is that of `rank`.
    """
    if not zipfile.is_zipfile(path):
        try:
            state = read_yaml(path)
        except ValueError as error:
            raise DamagedCheckpoint(f"'{path}' is damaged: {error}") from error
        checks = {"step": is_count, "avg_train_loss": _is_float}
        if isinstance(state, dict):  # older ones have no optimizer_step
            state = {"optimizer_step": state.get("step"), **state}
        _check(path, state, {**checks, "optimizer_step": is_count})
        return state
    state = torch.load(path, map_location="cpu", weights_only=True)
    _check(
        path,
        state,
        {
            "step": is_count,
            "avg_train_loss": _is_float,
            **dict.fromkeys(COUNTERS, is_count),
            "tally": _is_tally,
            "joint_batch": is_count,
            "threads": is_count,
            "faults": _are_texts,
            "log": lambda v: v is None or isinstance(v, str),
            "kept": lambda v: isinstance(v, dict),
            "random": _are_random_states,
        },
    )
    unknown = sorted(map(str, set(state["kept"]) - set(kept)))
    if unknown:
        raise DamagedCheckpoint(
            f"'{path}' would set {', '.join(unknown)[:200]}; a checkpoint "
            f"keeps {', '.join(kept) or 'nothing'}. Is it of another version?"
        )
    _check(path, state["kept"], {name: kept[name] for name in state["kept"]})
    state["random"] = state["random"][min(rank, len(state["random"]) - 1)]
    now = random_state()
    try:
        restore_random_state(state["random"])
    except Exception as error:  # of three libraries
        raise DamagedCheckpoint(
            f"'{path}' is damaged: its random state cannot be set ({error!r})."
        ) from error
    finally:
        restore_random_state(now)
    return state


def _check(path: Any, values: Any, checks: Mapping[str, Check]) -> None:
    if not isinstance(values, dict):
        raise DamagedCheckpoint(f"'{path}' is damaged: it has no keys.")
    for name, is_right in checks.items():
        if name not in values or not is_right(values[name]):
            found = str(values[name])[:80] if name in values else "missing"
            raise DamagedCheckpoint(f"'{path}' is damaged: {name} is {found}.")


def _is_float(value: Any) -> bool:
    """NaN too: an average of losses may be that."""
    return is_number(value) or isinstance(value, float)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )


def _are_random_states(value: Any) -> bool:
    """Of each process, and short: what is restored is unpacked before."""
    try:
        return (
            isinstance(value, list)
            and len(value) > 0
            and all(
                isinstance(each["python"][1], tuple)
                and len(each["python"][1]) < 1000
                and isinstance(each["numpy"][0], list)
                and len(each["numpy"][0]) < 1000
                for each in value
            )
        )
    except (TypeError, KeyError, IndexError):
        return False


def _is_tally(value: Any) -> bool:
    names = [field.name for field in dataclasses.fields(Tally)]
    counts = ("n_right", "n_seen", "n_steps")
    return (
        isinstance(value, dict)
        and sorted(value) == sorted(names)
        and all(map(_is_float, value.values()))
        and all(is_count(value[name]) for name in counts)
    )


def warn_of_other_threads(before: int) -> None:
    """Sums in another order: on CPU the one thing left to the machine."""
    now = torch.get_num_threads()
    if before != now:
        logger.warning(
            "The run was begun with %d threads and goes on with %d: the "
            "last bits of its numbers will not be those of a run that was "
            "never interrupted. With OMP_NUM_THREADS=%d they are.",
            before,
            now,
            before,
        )


def check_joint_batch(state: Mapping, joint: int, path) -> None:
    """Can this run finish the epoch that another one began?"""
    if state["joint_batch"] != joint:
        raise CheckpointError(
            f"'{path}' was written within an epoch of joint batches of "
            f"{state['joint_batch']} utterances, now they have {joint}. "
            "Keep (number of processes) x --batch_size, or delete "
            f"'{os.path.dirname(path)}' to go on from the end of the "
            "epoch before."
        )
