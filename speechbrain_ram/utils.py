"""What all parts use and what knows nothing of speech.

Whole files, memory, threads, errors, numbers in text, several processes.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import math
import os
import platform
import re
import reprlib
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

# -- Files that are complete or not there -------------------------------------


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden name beside `path` that becomes `path` when the block ends.

    The name ends in `.tmp`, so tell a writer the format. The file gets the
    usual mode. After an exception an older file of that name is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        # Some writers, safetensors among them, let nobody else read.
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """As :func:`atomic_path`, with a UTF-8 text file open for writing."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        yield file


@contextmanager
def atomic_folder(
    path: str | os.PathLike, replace: bool = False
) -> Iterator[Path]:
    """As :func:`atomic_path`, for a folder, which the block finds empty.

    Without `replace`, a folder of that name that is not empty is an OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _hidden(path), _hidden(path)
    temporary.mkdir()
    try:
        yield temporary
        if replace and path.exists():
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no infinity and no NaN: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else f"{key:g}": _finite(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- Memory that was freed stays with the process -----------------------------
#
# By default the C library gives large blocks back to the kernel at once and
# asks for them again at the next training step. The kernel clears each page
# before it hands it out, which on a CPU took a tenth of a step and more.

# From malloc.h of glibc; -1 as the trim threshold means never.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees instead of giving it back.

    For a process of its own that repeats the same work, as training does; it
    then looks as large as it ever was. Only glibc (most of Linux) can be told;
    returns whether it was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_memory() -> None:
    """Return freed memory to the system: for a process that lives on idle."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# -- One utterance a core, instead of several cores on one utterance ----------
#
# PyTorch splits each operation among the cores. The operations on one utterance
# are so small that the cores wait for each other; with an utterance each, they
# do not.

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def n_threads(device: str | torch.device, asked: int | None = None) -> int:
    """How many threads should compute.

    By default as many as PyTorch uses for one operation on a CPU, elsewhere 2:
    one prepares and sends while the other waits for the device.
    """
    if asked is None:
        import torch

        on_cpu = torch.device(device).type == "cpu"
        return torch.get_num_threads() if on_cpu else 2
    if asked < 1:
        raise ValueError(f"threads is {asked}, allowed is 1 or more.")
    return asked


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map`, in order, where each call has a core to itself.

    PyTorch's own threads are one in each thread. Items are taken only a few
    ahead of the results, and the first error ends it.
    """
    if threads == 1:
        yield from map(work, items)
        return
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        threads, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        with pool:
            yield from ahead(pool, work, items, depth=threads + 1)
    finally:
        torch.set_num_threads(before)  # new threads would start with 1


def ahead(
    pool: Executor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    depth: int = 4,
) -> Iterator[Result]:
    """`map` that works at most `depth` items ahead of the consumer."""
    todo = iter(items)
    waiting = [pool.submit(work, item) for item in islice(todo, depth)]
    try:
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(work, item) for item in islice(todo, 1)]
            yield done
    finally:  # where the consumer left early
        for one in waiting:
            one.cancel()


# -- Errors that a user can mend, said in one line ----------------------------
#
# A wrong option, a file that is missing, a disk that is full: the message
# helps, and a traceback would hide it. Every other error is a fault in a
# program and keeps its traceback.

ERROR = 2  # the exit status of every program then, as argparse's and click's
_CLASSES = (ValueError, OSError, ImportError, MemoryError)

# All but tab and newline, marks that turn text around, half characters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

logger = logging.getLogger(__name__)


def is_user_error(error: BaseException) -> bool:
    """Whether a message of one line says all that a user needs.

    That is so for wrong values, files, packages and memory, and for all error
    classes of speechbrain_ram itself.
    """
    kind = type(error)
    ours = kind.__module__.split(".")[0] == __name__.split(".")[0]
    # By name: PyTorch takes seconds to import.
    gpu_memory = kind.__name__ == "OutOfMemoryError"
    return (
        isinstance(error, _CLASSES)
        or gpu_memory
        or (ours and isinstance(error, Exception))
    )


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"'{error.filename}': {error.strerror}"
    lines = [line.strip() for line in text.splitlines()]
    return printable(" ".join(filter(None, lines))) or type(error).__name__


def printable(text: str) -> str:
    """Text of any file for a terminal: control characters become escapes.

    A terminal obeys them: they clear it, rename it, or turn text around.
    """
    return _CONTROL.sub(
        lambda found: found[0].encode("unicode_escape").decode(), text
    )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with `PROGRAM: MESSAGE` on a user's error.

    The traceback goes to the logger at level DEBUG: a training run has it in
    OUTPUT/log.txt.
    """
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        logger.debug("Ends with an error:", exc_info=True)
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        sys.exit(ERROR)


def install_command(extra: str) -> str:
    """For pip: an installed package goes by its name, a clone by its folder."""
    installed = any(distributions(name="speechbrain-ram"))
    where = "speechbrain-ram" if installed else Path(__file__).parent.parent
    return f'pip install "{where}[{extra}]"'


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Imports of packages that one of our extras brings.

    The ImportError says how to get what is missing; `what` begins it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{what} needs more ({error}): {install_command(extra)}",
            name=error.name,
        ) from error


_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole_number(text: str) -> int:
    """`int`, but a ValueError for 1_0, for digits of other scripts than ASCII
    and for more than 18 of them, which no array of 64 bits holds.
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise ValueError(
            f"{reprlib.repr(text)} is not a whole number of at most 18 digits"
        )
    return int(text)


def number(text: str) -> float:
    """`float`, but a ValueError for 1_0, for digits of other scripts than
    ASCII, for nan and for what is, or rounds to, infinity.
    """
    if len(text) < 400 and _NUMBER.fullmatch(text.strip()):
        value = float(text)
        if math.isfinite(value):
            return value
    raise ValueError(f"{reprlib.repr(text)} is not a finite number")


def is_number(value: Any) -> bool:
    """Whether it is a finite number, not a truth value."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Not isfinite(value): whole numbers may be too large for a float.
    return plain and -1e300 < value < 1e300


def first_ten(names: Sequence[str], between: str = ", ") -> str:
    """The first ten names, and how many more there are."""
    shown = list(names[:10])
    if len(names) > 10:
        end = "." if "\n" in between else ""  # the names are sentences
        shown.append(f"and {len(names) - 10} more{end}")
    return between.join(shown)


# -- What several processes tell each other; a single one sends nothing -------


def n_processes() -> int:
    """How many processes train together."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def wait_for_all() -> None:
    """Wait until all processes are here; all must call this."""
    if group := _group():
        group.barrier()


def _group():
    """`torch.distributed` where there is a group; torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return None
    return torch.distributed if torch.distributed.is_initialized() else None


def gathered(mine: Any) -> list:
    """A picklable object of every process, by rank; all must call this."""
    if n_processes() == 1:
        return [mine]
    everything = [None] * n_processes()
    _group().all_gather_object(everything, mine)
    return everything


def together(work: Callable[[], Result]) -> list[Result]:
    """The results of a piece of work on every process, by rank.

    All must call this. An error on one process is an error on all of them, so
    that none waits for one that has left. Results and errors must be picklable.
    """
    if n_processes() == 1:
        return [work()]
    mine = problem = None
    try:
        mine = work()
    except (Exception, SystemExit) as error:
        problem = error
    outcomes = gathered((mine, problem))
    for place, (_, error) in enumerate(outcomes):
        if error is None:
            continue
        if not isinstance(error, SystemExit):  # its argument is the status
            error.args = (f"Rank {place} failed: {error}",)
        raise error from problem
    return [result for result, _ in outcomes]


def of_rank_0(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises on rank 0; all must call this."""
    return together(lambda: None if rank() else work())[0]


def all_numbers(mine: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As :func:`gathered`, for as many whole numbers on each; faster.

    From host to host: no device is waited for.
    """
    if n_processes() == 1:
        return [mine]
    import torch

    tensor = torch.tensor(mine)
    parts = [torch.empty_like(tensor) for _ in range(n_processes())]
    torch.distributed.all_gather(parts, tensor, group=_host_group())
    return [tuple(part.tolist()) for part in parts]


@functools.cache
def _host_group():
    """A group that sends from the host's memory; all make it together."""
    distributed = _group()
    if distributed.get_backend() == "gloo":
        return None  # the one there is
    return distributed.new_group(backend="gloo")


def leave_group() -> None:
    """Let go of the other processes, as the last thing of a script.

    Gloo's threads end with the last reference to the group. If Python ends
    before them, the process can abort when all its work is done, and torchrun
    takes that for a failure. Models in DistributedDataParallel refer to the
    group: they must be out of scope.
    """
    _host_group.cache_clear()
    if group := _group():
        gc.collect()
        group.destroy_process_group()
