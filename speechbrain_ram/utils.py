"""What all parts use and what knows nothing of speech.

Whole files, memory, threads, errors and lists in words, several processes.
"""

from __future__ import annotations

import ctypes
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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

# -- Files that are complete or not there -------------------------------------


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write a file under, which then takes its own.

    Arguments
    ---------
    path : path
        The file to write; its folder is made where it is missing.

    Yields
    ------
    Path
        In the same folder, hidden, different for each caller, ending in
        `.tmp`: say the format where it would be taken from the ending. The
        block writes the whole file, which gets the mode that any new file
        gets here. An exception inside the block leaves an older file of that
        name as it was, and nothing else.

    Example
    -------
    >>> path = getfixture("tmp_path") / "new" / "one"
    >>> with atomic_path(path) as temporary:
    ...     _ = temporary.write_bytes(b"1")
    ...     path.exists()
    False
    >>> path.read_bytes()
    b'1'
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
    """As :func:`atomic_path`, with a text file open for writing.

    Arguments
    ---------
    path : path
        The file to write.

    Yields
    ------
    text file
        UTF-8, line ends as written.

    Example
    -------
    >>> path = getfixture("tmp_path") / "list.txt"
    >>> with atomic_writer(path) as file:
    ...     _ = file.write("one\\n")
    >>> path.read_text()
    'one\\n'
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        yield file


@contextmanager
def atomic_folder(
    path: str | os.PathLike, replace: bool = False
) -> Iterator[Path]:
    """As :func:`atomic_path`, for a folder with all that is in it.

    Arguments
    ---------
    path : path
        The folder to make.
    replace : bool
        Whether one of that name that holds something is replaced; without,
        it is an OSError.

    Yields
    ------
    Path
        An empty folder beside it, hidden, ending in `.tmp`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "folder"
    >>> for text in ("old", "new"):
    ...     with atomic_folder(path, replace=True) as temporary:
    ...         _ = (temporary / "file").write_text(text)
    >>> (path / "file").read_text()
    'new'
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
    """JSON, which has no infinity and no NaN: they become null.

    Example
    -------
    >>> json_text({0.01: [1.5, float("inf")]})
    '{"0.01": [1.5, null]}'
    """
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
    then looks as large as it ever was. Only glibc (most of Linux) can be told.

    Returns
    -------
    bool
        Whether it was told.

    Example
    -------
    >>> keep_freed_memory() in (True, False)
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


# -- One utterance a core, instead of several cores on one utterance ----------
#
# PyTorch splits each operation among the cores. On one utterance they are so
# small that the cores wait for each other; on utterances of their own they do
# not.

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def n_threads(device: str | torch.device, asked: int | None = None) -> int:
    """How many threads should compute.

    Arguments
    ---------
    device : str or torch.device
        Where the computing is done.
    asked : int, optional
        What the caller wants; by default, on a CPU as many as PyTorch uses
        for one operation, elsewhere one.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        Fewer than one was asked for.

    Example
    -------
    >>> n_threads("cuda:0"), n_threads("cpu", 3)
    (1, 3)
    """
    if asked is None:
        import torch

        on_cpu = torch.device(device).type == "cpu"
        return torch.get_num_threads() if on_cpu else 1
    if asked < 1:
        raise ValueError(f"threads is {asked}, allowed is 1 or more.")
    return asked


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map`, in order, where each call has a core to itself.

    Arguments
    ---------
    work : callable
        May be called by several threads at once. PyTorch's own threads are
        one in each of them.
    items : iterable
        Taken only a few ahead of the results.
    threads : int
        With 1, this is `map`.

    Returns
    -------
    iterator
        Of results. The first error ends it.

    Example
    -------
    >>> list(in_threads(abs, [-2, 1, -3], threads=2))
    [2, 1, 3]
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
# A wrong option, a file that is missing, a disk that is full: the message is
# what helps, a traceback hides it. Every other error is a fault in a program
# and keeps its traceback.

_CLASSES = (ValueError, OSError, ImportError, MemoryError)

logger = logging.getLogger(__name__)


def is_user_error(error: BaseException) -> bool:
    """Whether a message of one line says all that a user needs.

    So are values, files, packages and memory, and all error classes of
    speechbrain_ram itself.
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
    """Give the message of an error as one line.

    Example
    -------
    >>> one_line(FileNotFoundError(2, "No such file or directory", "a.wav"))
    "'a.wav': No such file or directory"
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"'{error.filename}': {error.strerror}"
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


@contextmanager
def one_line_errors(program: str, status: int = 1) -> Iterator[None]:
    """End the program with one line on a user's error.

    The traceback goes to the logger at level DEBUG: a training run has it in
    OUTPUT/log.txt.

    Arguments
    ---------
    program : str
        What the line begins with, such as 'verify_speakers.py'.
    status : int
        That the program exits with.
    """
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        logger.debug("Ends with an error:", exc_info=True)
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Imports of packages that one of our extras brings.

    Arguments
    ---------
    what : str
        What needs them, such as 'A picture'.
    extra : str
        Its name in `setup.py`.

    Raises
    ------
    ImportError
        Says how to get what is missing.

    Example
    -------
    >>> with needs_extra("A picture", "report"):
    ...     raise ImportError("No module named 'matplotlib'")
    Traceback (most recent call last):
    ...
    ImportError: A picture needs more (No module named 'matplotlib'): \
pip install "speechbrain-ram[report]"
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{what} needs more ({error}): "
            f'pip install "speechbrain-ram[{extra}]"',
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


def first_ten(names: Sequence[str], between: str = ", ") -> str:
    """The first ten names, and how many more there are.

    Example
    -------
    >>> first_ten(["a", "b"]), first_ten("abcdefghijklm")
    ('a, b', 'a, b, c, d, e, f, g, h, i, j, and 3 more')
    """
    shown = list(names[:10])
    if len(names) > 10:
        shown.append(f"and {len(names) - 10} more")
    return between.join(shown)


# -- What several processes tell each other; with one, nothing is sent --------


def n_processes() -> int:
    """How many processes train together.

    Example
    -------
    >>> n_processes()
    1
    """
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """Which of them this process is, from 0 on."""
    group = _group()
    return group.get_rank() if group else 0


def wait_for_all() -> None:
    """Go on when all processes are here; all must call this."""
    if group := _group():
        group.barrier()


def _group():
    """`torch.distributed` where there is a group; torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return None
    return torch.distributed if torch.distributed.is_initialized() else None


def gathered(mine: Any) -> list:
    """Collect a picklable object of every process; all must call this.

    Arguments
    ---------
    mine : object
        Of this process.

    Returns
    -------
    list
        By rank.

    Example
    -------
    >>> gathered("a")
    ['a']
    """
    if n_processes() == 1:
        return [mine]
    everything = [None] * n_processes()
    _group().all_gather_object(everything, mine)
    return everything


def together(work: Callable[[], Result]) -> list[Result]:
    """Do a piece of work on every process; all must call this.

    An error on one process is an error on all of them, so that none waits
    for one that has left.

    Arguments
    ---------
    work : callable
        Its result, and what it raises, must be picklable.

    Returns
    -------
    list
        The results by rank.

    Example
    -------
    >>> together(lambda: 3)
    [3]
    """
    if n_processes() == 1:
        return [work()]
    mine = problem = None
    try:
        mine = work()
    except (Exception, SystemExit) as error:
        problem = error
    outcomes = gathered((mine, problem))
    for rank, (_, error) in enumerate(outcomes):
        if error is None:
            continue
        if not isinstance(error, SystemExit):  # its argument is the status
            error.args = (f"Rank {rank} failed: {error}",)
        raise error from problem
    return [result for result, _ in outcomes]


def of_rank_0(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, on rank 0; all must call this.

    Arguments
    ---------
    work : callable
        Called on rank 0 only.

    Example
    -------
    >>> of_rank_0(lambda: "the first's word")
    "the first's word"
    """
    return together(lambda: None if rank() else work())[0]


def all_numbers(
    mine: tuple[int, ...], device: str | torch.device = "cpu"
) -> list[tuple[int, ...]]:
    """Collect some whole numbers of every process, faster than objects.

    Arguments
    ---------
    mine : tuple of int
        Of this process, as many on each.
    device : str or torch.device
        Where the backend sends from.

    Returns
    -------
    list of tuple of int
        By rank.

    Example
    -------
    >>> all_numbers((1, 2))
    [(1, 2)]
    """
    if n_processes() == 1:
        return [mine]
    import torch

    tensor = torch.tensor(mine, device=device)
    parts = [torch.empty_like(tensor) for _ in range(n_processes())]
    torch.distributed.all_gather(parts, tensor)
    return [tuple(part.tolist()) for part in parts]


def leave_group() -> None:
    """Let go of the other processes, as the last thing of a script.

    Gloo's threads end with the last reference to the group. If Python ends
    before them, the process can abort when all its work is done, and torchrun
    takes that for a failure. Models in DistributedDataParallel refer to the
    group: they must be out of scope.

    Example
    -------
    >>> leave_group()  # one process: nothing to let go of
    """
    if group := _group():
        gc.collect()
        group.destroy_process_group()
