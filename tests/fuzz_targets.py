"""Every reader of files of others, with a good file each to begin from.

A target takes bytes. It may succeed, or raise the error of its own; any other
exception is a bug. Used by test_fuzz.py and by fuzz_atheris.py.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import fuzz_values

SECONDS = 20  # for one input, of the processor
MEGABYTES = 100  # more than before


class Target(NamedTuple):
    """A reader, its own errors, and a good file.

    `place` is where the bytes are put before `read(place)`. `changes(good)`
    lists functions, each of which gives the bytes of a file with one field
    changed; `seal` writes checksums anew in a changed file. `many` is how
    many inputs the long run tries.
    """

    read: Callable[[Path], Any]
    error: type | tuple
    good: bytes
    place: Path
    changes: Callable[[bytes], list]
    many: int
    seal: Callable[[bytes], bytes] = bytes


def targets(folder: Path) -> dict[str, Target]:
    """Name -> target; `folder` is for their files."""
    # not above, for they take Target from here
    from fuzz_encoders import encoders
    from fuzz_lists import corpora, lists, made_by_us, settings
    from fuzz_recordings import recordings

    found: dict[str, Target] = {}
    for group in (
        lists,
        settings,
        made_by_us,
        corpora,
        recordings,
        encoders,
    ):
        place = folder / group.__name__
        place.mkdir()
        found |= group(place)
    return found


def try_input(target: Target, data: bytes) -> bool:
    """Whether the reader accepted it."""
    target.place.write_bytes(target.seal(data))
    fuzz_values.executed.clear()
    try:
        target.read(target.place)
    except target.error as error:
        text = str(error)
        assert text.strip()
        if isinstance(error, ValueError) and not _is_of_package(error):
            # where that is a reader's error, Python's own is not
            assert type(error) is ValueError
            names = (target.place.name, "--", "'encoder: ")
            assert any(name in text for name in names), text
        return False
    finally:
        assert not fuzz_values.executed
    return True


def _is_of_package(error: BaseException) -> bool:
    return type(error).__module__.startswith("speechbrain_ram")


class Outcome:
    """What happened to the inputs of one target.

    Failures of one type in one line are one; the smallest input is kept.
    """

    def __init__(self) -> None:
        self.inputs = self.accepted = 0
        self.seconds = self.slowest = self.megabytes = 0.0
        self.failures: dict[tuple[str, str], tuple[bytes, str]] = {}

    def failed(self, kind: str, where: str, data: bytes, why: str = "") -> None:
        """Note an input; `kind` and `where` tell failures apart."""
        smallest = self.failures.get((kind, where))
        if smallest is None or len(data) < len(smallest[0]):
            self.failures[kind, where] = data, why

    def __str__(self) -> str:
        return "\n".join(
            f"{kind} at {where}: {why}\n  {len(data)} bytes, {data[:300]!r}"
            for (kind, where), (data, why) in self.failures.items()
        )


def try_inputs(target: Target, inputs) -> Outcome:
    """Try them all, and note the time and the memory that each needs."""
    outcome = Outcome()
    before = _forget_peak()
    try:
        with alarm_clock(3 * SECONDS), _quiet():
            for data in inputs:
                if outcome.inputs % 100 == 0:  # what signals cannot end
                    faulthandler.dump_traceback_later(900, exit=True)
                    # what all before have left in the heap is not its own
                    before = _forget_peak()
                signal.alarm(3 * SECONDS)
                began = time.process_time()
                try:
                    outcome.accepted += try_input(target, data)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    outcome.failed(*_described(error), data, str(error)[:200])
                spent = time.process_time() - began
                outcome.inputs += 1
                outcome.seconds += spent
                outcome.slowest = max(outcome.slowest, spent)
                if spent > SECONDS:
                    outcome.failed("too slow", f"{spent:.0f} s", data)
                grown = (_peak() - before) / 1e6
                outcome.megabytes = max(outcome.megabytes, grown)
                if grown > MEGABYTES:
                    size = f"{round(grown, -2):.0f} MB"
                    outcome.failed("too large", size, data)
                    before = _forget_peak()
    finally:
        faulthandler.cancel_dump_traceback_later()
        target.place.write_bytes(target.seal(target.good))
    return outcome


@contextlib.contextmanager
def alarm_clock(seconds: int):
    """What takes longer is ended with a traceback."""

    def too_long(*_):
        raise TimeoutError(f"an input took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet():
    """Progress bars and the like go nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _forget_peak() -> int:
    """Memory in use now, in bytes; where Linux allows it the peak is too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory in use since, of everything in this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _described(error: BaseException) -> tuple[str, str]:
    """The type, and the line of the package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/speechbrain_ram/" in f.filename] or frames
    name = ours[-1].filename.rpartition("/speechbrain_ram/")[2]
    return type(error).__name__, f"{name}:{ours[-1].lineno}"


#: What breaks parsers, put anywhere into good files.
TOKENS = (
    *(b"", b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"),
    *(b"\n", b"\r", b"\t", b" ", b",", b'"', b"'", b"$", b"/", b"..", b"%s"),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 400, b"0x10", b"null", b"true"),
    *(b"{", b"}", b"[", b"]", b"[" * 3000, b'{"a":' * 2000, b"\xef\xbb\xbf"),
    *("\u2028".encode(), "\u202e".encode(), "é".encode()),
)


def mutate(good: bytes, draw: Random) -> bytes:
    """A good file with a few pieces cut, doubled, flipped or replaced."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        begin = draw.randrange(len(data) + 1)
        end = min(len(data), begin + draw.choice((0, 1, 4, 40)))
        kind = draw.randrange(4)
        if kind == 0:
            data[begin:end] = draw.choice(TOKENS)
        elif kind == 1:
            data[begin:begin] = data[begin:end] * draw.choice((1, 50))
        elif kind == 2 and data:
            data[begin % len(data)] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def inputs(target: Target, draw: Random, count: int):
    """Half with one field changed, none twice while others are left.

    The others are cut and flipped anywhere, one in ten nothing but noise.
    """
    changes = target.changes(target.good)
    draw.shuffle(changes)
    for i in range(count):
        if i % 2 == 0:
            yield changes[i // 2 % len(changes)]()
        elif i % 10 == 9:
            yield _noise(draw)
        else:
            good = target.good
            if i % 4 == 1:
                good = draw.choice(changes)()
            yield mutate(good, draw)


def _noise(draw: Random) -> bytes:
    if draw.random() < 0.5:
        return draw.randbytes(draw.randrange(300))
    letters = (
        chr(draw.choice((draw.randrange(128), draw.randrange(55000))))
        for _ in range(draw.randrange(200))
    )
    return "".join(letters).encode()
