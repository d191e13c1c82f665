"""What a run is: its data, its labels and the settings that it learns from.

An output folder belongs to one run. ``run.json``, written before anything is
trained and kept in every checkpoint, says which. From the first checkpoint on,
the same command continues the run, and a command that would learn something
else is refused. The split and the labels are read back, never drawn again.
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from speechbrain_ram.data.manifest import read_manifest
from speechbrain_ram.data.plain import read_json
from speechbrain_ram.utils import atomic_writer, first_ten
from speechbrain_ram.verification.trials import models_beside

logger = get_logger(__name__)
logging.getLogger("filelock").setLevel(logging.WARNING)  # tells each attempt

#: Of run.json; a reader refuses the numbers it does not know.
FORMAT = 1

RUN_FILE = "run.json"

_LARGEST = 2**26  # bytes of run.json: the names of a million speakers

#: What the model card says of itself; it may be corrected later.
_CORRECTABLE = ("name", "language", "license")


class RunError(ValueError):
    """A command does not fit the run in its output folder."""


@register_checkpoint_hooks
@dataclasses.dataclass(frozen=True)
class Run:
    """The identity of a run.

    `settings` are from :func:`.settings.learned_settings`; `epochs` is what the
    first command asked for, later ones may ask for more; `speakers` are in the
    order of the classifier's rows; `files` has the number of lines and a
    checksum of ``train``, ``valid`` and perhaps ``trials``; `facts` are the
    model card's.
    """

    id: str
    settings: dict[str, Any]
    epochs: int
    speakers: list[str]
    files: dict[str, dict]
    facts: dict[str, Any]

    def label_encoder(self) -> CategoricalEncoder:
        """The labels of the run's classifier."""
        encoder = CategoricalEncoder()
        encoder.update_from_iterable(self.speakers)
        encoder.expect_len(len(self.speakers))
        return encoder

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``run.json``."""
        with atomic_writer(Path(folder) / RUN_FILE) as file:
            file.write(self._text())

    def _text(self) -> str:
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    def corrected(self, facts: Mapping[str, Any]) -> Run:
        """The run with another name, language or licence in its card."""
        known = {key: facts[key] for key in _CORRECTABLE if key in facts}
        return dataclasses.replace(self, facts={**self.facts, **known})

    @mark_as_saver
    def _save(self, path):
        if if_main_process():
            Path(path).write_text(self._text(), encoding="utf-8")

    @mark_as_loader
    def _check(self, path, end_of_epoch):
        other = _parse(Path(path))
        if other.id != self.id:
            raise RunError(
                f"'{path}' is a checkpoint of another run ({other.id} instead "
                f"of {self.id}). Was it copied here? Move it out of the folder."
            )


def read_run(
    folder: str | os.PathLike, save_folder: str | os.PathLike
) -> Run | None:
    """The run of an output folder; None where nothing has been learned yet.

    A first command that failed may be corrected. Where ``run.json`` is lost,
    the newest checkpoint has the same. Raises a RunError where neither tells.
    """
    folder = Path(folder)
    checkpoints = sorted(Path(save_folder).glob("CKPT*"))
    if not checkpoints and not (folder / "inference").exists():
        return None
    kept = [each / "run.ckpt" for each in reversed(checkpoints)]
    for file in (folder / RUN_FILE, *kept):
        if file.exists():
            return _parse(file)
    raise RunError(
        f"'{folder}' holds a trained encoder but no {RUN_FILE}, so that "
        "its data and settings are unknown. " + _ways_out(folder)
    )


def _parse(file: Path) -> Run:
    names = {field.name for field in dataclasses.fields(Run)}
    try:
        data = read_json(file, _LARGEST)
        number = data.pop("format") if isinstance(data, dict) else None
        if number == FORMAT:
            if set(data) != names:
                raise ValueError(f"it has {', '.join(data)}"[:200])
            run = Run(**data)
            _check_values(run)
            return run
    except (OSError, KeyError, ValueError) as error:
        raise RunError(
            f"'{file}' cannot be read ({error}). Was it edited, or cut off?"
        ) from error
    raise RunError(
        f"'{file}' has format {str(number)[:80]}, this version of "
        f"speechbrain-ram reads format {FORMAT}. Was it written by a newer one?"
    )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def _check_values(run: Run) -> None:
    """Raise a ValueError that names a value of another kind than written."""
    for name, is_right in (
        ("id", isinstance(run.id, str)),
        ("settings", isinstance(run.settings, dict)),
        ("epochs", type(run.epochs) is int and run.epochs > 0),
        ("speakers", _are_texts(run.speakers)),
        ("facts", isinstance(run.facts, dict)),
        ("files", isinstance(run.files, dict)),
    ):
        if not is_right:
            raise ValueError(f"{name} is {str(getattr(run, name))[:80]!r}")
    if len(set(run.speakers)) < len(run.speakers):
        raise ValueError("speakers has a name twice")
    for name, file in run.files.items():
        if not isinstance(file, dict) or type(file.get("lines")) is not int:
            raise ValueError(f"files says of {name} {str(file)[:80]!r}")


def check_settings_of(
    run: Run,
    settings: Mapping[str, Any],
    epochs: int,
    folder: str | os.PathLike,
) -> None:
    """Refuse a command whose settings are not those of the run."""
    missing = object()
    differ = {
        name: (run.settings.get(name, missing), settings.get(name, missing))
        for name in dict.fromkeys([*run.settings, *settings])
        if run.settings.get(name, missing) != settings.get(name, missing)
    }
    # An option differs wherever the YAML refers to it: name it once.
    options = {name: pair for name, pair in differ.items() if "." not in name}
    differ = {
        name: pair
        for name, pair in differ.items()
        if name in options or pair not in options.values()
    }
    lines = [
        f"  {name}: "
        + " -> ".join("none" if v is missing else str(v) for v in pair)
        for name, pair in differ.items()
    ]
    if epochs < run.epochs:
        lines.append(
            f"  number_of_epochs: {run.epochs} -> {epochs} (more are allowed)"
        )
    _refuse(lines, folder)


def _refuse(lines: list[str], folder: str | os.PathLike) -> None:
    if lines:
        raise RunError(
            f"'{folder}' belongs to another run than this command describes "
            "(there -> here):\n" + ";\n".join(lines) + ".\n" + _ways_out(folder)
        )


def _ways_out(folder: str | os.PathLike) -> str:
    trained = Path(folder) / "inference"
    start = (
        f", with --pretrained {trained} to start from its encoder"
        if trained.is_dir()
        else ""
    )
    return f"Give another --output_folder{start}."


# -- the data -------------------------------------------------------------


def prepare_data(
    prepare: Callable,
    run: Run | None,
    folder: str | os.PathLike,
    trials: str | os.PathLike | None,
) -> tuple[Path, Path]:
    """Call a recipe's `prepare`; a run that goes on keeps its manifests.

    The corpus is looked at again in either case. A run that goes on has it,
    and the development `trials`, compared with its own: a RunError says where
    they are others. For that, `prepare` gets an `output_dir` that is deleted:
    the recordings that manifests name lie elsewhere.
    """
    if run is None:
        return prepare()
    kept = Path(prepare.keywords["output_dir"])
    fresh = Path(folder) / ".prepared"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        cache = kept / "headers.cache"
        if cache.exists():
            shutil.copy2(cache, fresh)
        with _quiet():  # its own split is not the run's
            manifests = prepare(output_dir=fresh)
        train_csv, valid_csv = (kept / each.name for each in manifests)
        with _put_back(fresh, kept):
            _refuse(_other_utterances(kept, fresh), folder)
            files = data_files(train_csv, valid_csv, trials)
            check_files_of(run, files, folder)
        if (fresh / cache.name).exists():
            shutil.move(fresh / cache.name, cache)  # to another disk, too
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return train_csv, valid_csv


@contextmanager
def _put_back(fresh: Path, kept: Path) -> Iterator[None]:
    """What was deleted is there, and stays if the block finds it right."""
    kept.mkdir(parents=True, exist_ok=True)
    lost = [each for each in fresh.iterdir() if not (kept / each.name).exists()]
    try:
        for manifest in lost:
            shutil.copy2(manifest, kept)
        yield
    except BaseException:
        for manifest in lost:
            (kept / manifest.name).unlink(missing_ok=True)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    corpora = logging.getLogger("speechbrain_ram.corpora")
    level = corpora.level
    corpora.setLevel(logging.WARNING)
    try:
        yield
    finally:
        corpora.setLevel(level)


def _other_utterances(kept: Path, fresh: Path) -> list[str]:
    """How two folders of manifests differ, whatever their split is."""
    names = sorted(each.name for each in fresh.glob("*.csv"))
    if filecmp.cmpfiles(kept, fresh, names, shallow=False)[0] == names:
        return []
    there, here = (
        {
            row.id: (row.spk_id, row.start, row.stop)
            for file in folder.glob("*.csv")
            for row in read_manifest(file)
        }
        for folder in (kept, fresh)
    )
    lines = []
    speakers = [{row[0] for row in rows.values()} for rows in (there, here)]
    for what, old, new in (
        ("speakers", *speakers),
        ("utterances", set(there), set(here)),
    ):
        if old != new:
            lines.append(
                f"  {what}: {len(old):,} -> {len(new):,}"
                + _some("only there", old - new)
                + _some("only here", new - old)
            )
    changed = {i for i in set(there) & set(here) if there[i] != here[i]}
    if changed:
        first = min(changed)
        lines.append(
            f"  {len(changed):,} utterances have another speaker, begin or "
            f"end: '{first}', {there[first]} -> {here[first]}"
        )
    return lines


def _some(what: str, names: set[str]) -> str:
    if not names:
        return ""
    return f"; {len(names):,} {what}: {first_ten(sorted(names))}"


def data_files(
    train_csv: Path, valid_csv: Path, trials: str | os.PathLike | None
) -> dict[str, dict]:
    """Number of lines and checksum of what a run learns from."""
    files = {"train": train_csv, "valid": valid_csv, "trials": trials}
    files["models"] = trials and models_beside(trials)
    return {
        name: _described(Path(file)) for name, file in files.items() if file
    }


def _described(file: Path) -> dict:
    content = file.read_bytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"lines": content.count(b"\n"), "checksum": digest}


def check_files_of(
    run: Run, files: Mapping[str, dict], folder: str | os.PathLike
) -> None:
    """Refuse manifests or trials that are not those the run began with."""
    what = {
        "train": "the training manifest",
        "valid": "the validation manifest",
        "trials": "the development trials",
        "models": "the development trials' models",
    }
    lines = []
    for name, title in what.items():
        old, new = run.files.get(name), files.get(name)
        if old != new:
            sizes = " -> ".join(
                f"{each['lines']:,} lines" if each else "none"
                for each in (old, new)
            )
            lines.append(f"  {title}: {sizes}, of other content")
    _refuse(lines, folder)


def begin_run(
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    epochs: int,
    label_encoder: CategoricalEncoder,
    files: Mapping[str, dict],
    facts: Mapping[str, Any],
) -> Run:
    """Give a run its identity and write it into its folder.

    Of an absolute path among the facts, only the name is kept.
    """
    ind2lab = label_encoder.ind2lab
    run = Run(
        id=secrets.token_hex(8),
        settings=dict(settings),
        epochs=epochs,
        speakers=[ind2lab[i] for i in range(len(ind2lab))],
        files=dict(files),
        facts={key: _without_path(value) for key, value in facts.items()},
    )
    run.write(folder)
    return run


def _without_path(value: Any) -> Any:
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value.rstrip("/"))
    return value


# -- the lock -------------------------------------------------------------


@contextmanager
def sole_owner(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of an output folder, made if missing.

    The system lets go of the lock when its owner ends, however it ends.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    owner = folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (FileExistsError, NotADirectoryError):
        raise RunError(
            f"--output_folder is '{folder}', which is, or lies in, a file. "
            "Give the name of a folder."
        ) from None
    except Timeout:
        who = "unknown"
        if owner.exists():
            who = owner.read_text(encoding="utf-8", errors="replace")[:200]
        raise RunError(
            f"'{folder}' is in use by another process: {who.strip()}. Wait "
            "for it, stop it, or give another --output_folder."
        ) from None
    except OSError as error:
        raise RunError(
            f"--output_folder '{folder}' cannot be written: {error.strerror}."
        ) from error
    try:
        with atomic_writer(owner) as file:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}, since "
                f"{since}\n"
            )
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
