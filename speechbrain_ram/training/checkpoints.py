"""Checkpoints that are whole or not there.

SpeechBrain's Checkpointer writes ``CKPT.yaml`` first and the parameters
afterwards, in place: a run that is killed in between leaves a folder that
looks like a checkpoint. :class:`SafeCheckpointer` writes to a hidden folder,
notes a checksum of every file, syncs, and renames. The folders remain
SpeechBrain's: its own Checkpointer reads them.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    METAFNAME,
    Checkpoint,
    Checkpointer,
    average_checkpoints,
    ckpt_recency,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger

from speechbrain_ram.training.checkpoint_files import (
    FORMAT,
    AskedFiles,
    CheckpointError,
    DamagedCheckpoint,
    check_loaded,
    checksum,
    checksum_of_meta,
    option_kinds,
    read_checkpoint,
    write_meta,
)
from speechbrain_ram.utils import first_ten, of_rank_0, one_line, together

logger = get_logger(__name__)


class SafeCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, for runs that are killed.

    ====================  ===================================================
    writing               to ``.NAME.part``, synced, then renamed
    damage                found by checksum, reported by name, skipped
    pruning               after the new one is on the disk; the newest and
                          the one before it always stay
    full disk             a :class:`CheckpointError`; older ones stay intact
    clock set back        does not change which one is the newest
    ====================  ===================================================

    It takes the same arguments.

    Example
    -------
    >>> model = torch.nn.Linear(2, 2)
    >>> folder = getfixture("tmp_path")
    >>> checkpointer = SafeCheckpointer(folder, {"model": model})
    >>> older = checkpointer.save_checkpoint()
    >>> newer = checkpointer.save_checkpoint()
    >>> _ = (newer.path / "model.ckpt").write_bytes(b"torn")
    >>> SafeCheckpointer(folder).find_checkpoint().path == older.path
    True
    """

    def __init__(self, checkpoints_dir, *args, **kwargs):
        super().__init__(checkpoints_dir, *args, **kwargs)
        self._sound: dict[Path, Checkpoint] = {}
        self._damaged: dict[Path, str] = {}

    # -- writing ----------------------------------------------------------

    def save_checkpoint(
        self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO
    ) -> Checkpoint | None:
        """Write one checkpoint; its folder appears when it is complete."""
        try:
            part = super().save_checkpoint(
                meta or {}, end_of_epoch, name, logging.DEBUG
            )
            final = None if part is None else self._publish(part)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError without an errno.
            if not _is_of_writing(error):
                raise
            full = is_full_disk(error) or self._has_no_room()
            self._sweep()
            why = self._why_not_written(error, full)
            raise CheckpointError(why) from error
        ddp_barrier()
        if final is not None:
            logger.log(verbosity, "Saved checkpoint %s", final.path)
        return final

    def save_and_keep_only(self, *args, importance_keys=(), **kwargs) -> None:
        """Write one checkpoint, then remove those of least importance.

        SpeechBrain's own method adds to the list that it is given, its
        default one too.
        """
        keys = [*importance_keys]
        super().save_and_keep_only(*args, importance_keys=keys, **kwargs)

    def delete_checkpoints(
        self,
        *,
        num_to_keep=1,
        min_keys=None,
        max_keys=None,
        importance_keys: Sequence[Callable] = (ckpt_recency,),
        ckpt_predicate=None,
        verbosity=logging.INFO,
    ) -> None:
        """Remove checkpoints, but never the newest nor the one before it.

        Should the newest turn out to be damaged, there is one to fall back on.
        Damaged ones are not removed: a person may want to look.
        """
        if num_to_keep < 0:
            raise ValueError(f"num_to_keep is {num_to_keep}, below 0.")
        orders = [
            *({"min_key": key} for key in min_keys or ()),
            *({"max_key": key} for key in max_keys or ()),
            *({"importance_key": key} for key in importance_keys),
        ]

        def remove() -> None:
            keep = set(self.find_checkpoints(max_num_checkpoints=2))
            candidates = set()
            for order in orders:
                ranked = self.find_checkpoints(
                    ckpt_predicate=ckpt_predicate, **order
                )
                candidates.update(ranked)
                keep.update(ranked[:num_to_keep])
            for checkpoint in candidates - keep:
                self._remove(checkpoint.path, verbosity)

        of_rank_0(remove)

    # -- reading ----------------------------------------------------------

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints that are whole; each is checked once."""
        found = []
        for path in self._list_checkpoint_dirs():
            if path in self._damaged:
                continue
            try:
                if path not in self._sound:
                    self._sound[path] = read_checkpoint(path)
                found.append(self._sound[path])
            except DamagedCheckpoint as error:
                self._damaged[path] = str(error)
                logger.warning("%s It is skipped.", error)
        return found

    def recover_if_possible(self, **how) -> Checkpoint | None:
        """Load the newest, or the best, checkpoint that is whole."""
        for checkpoint in self.choose_checkpoints(**how, max_num_checkpoints=1):
            self.load_checkpoint(checkpoint)
            return checkpoint
        return None

    def choose_checkpoints(self, **how) -> list[Checkpoint]:
        """`find_checkpoints` for several processes: what rank 0 finds.

        Disks that machines share may show each of them another folder. All
        processes must call this. Raises where every checkpoint is damaged, or a
        process does not see what rank 0 chose.
        """

        def find() -> list[Checkpoint]:
            found = self.find_checkpoints(**how)
            if not found and self._damaged and not self.list_checkpoints():
                raise CheckpointError(
                    "every checkpoint is damaged:\n"
                    + "\n".join(self._damaged.values())
                    + f"\nTo begin anew, delete '{self.checkpoints_dir}'."
                )
            return found

        chosen = of_rank_0(find)

        def look() -> None:
            for path in (each.path for each in chosen):
                if not (path / METAFNAME).is_file():
                    raise CheckpointError(
                        f"it does not see '{path}', from which rank 0 goes "
                        "on. The output folder must be on a disk that all "
                        "machines share."
                    )

        together(look)
        return chosen

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Load; a state that cannot be loaded or believed is a damage.

        Weights of another architecture stay the RuntimeError of torch.
        """
        files = AskedFiles(checkpoint.paramfiles)
        kinds = {
            name: option_kinds(each)
            for name, each in self.recoverables.items()
            if isinstance(each, torch.optim.Optimizer)
        }
        try:
            super().load_checkpoint(checkpoint._replace(paramfiles=files))
            for name, each in self.recoverables.items():
                if name in files:
                    files.last = name
                    check_loaded(each, kinds.get(name))
        except Exception as error:  # of the host, whatever the bytes say
            ours = type(error).__module__.startswith("speechbrain_ram.")
            if ours or "loading state_dict" in str(error):
                raise
            file = checkpoint.path / f"{files.last}.ckpt"
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            what = f"damaged ({why[:300]})" if file.exists() else "missing"
            raise DamagedCheckpoint(
                f"'{file}' is {what}. Delete '{checkpoint.path}' to go on from "
                "the checkpoint before it."
            ) from error

    def load_modules(self, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint, and nothing else.

        `recover_if_possible` would also set counters, random generators and the
        log back to where that checkpoint was written.
        """
        everything = self.recoverables
        self.recoverables = {
            name: each
            for name, each in everything.items()
            if isinstance(each, torch.nn.Module)
        }
        try:
            self.load_checkpoint(checkpoint)
        finally:
            self.recoverables = everything

    def load_mean(self, names: Sequence[str], number: int) -> None:
        """Load the mean weights of the last `number` epochs' ends.

        `names` are those of the modules among the recoverables.
        """
        newest = self.choose_checkpoints(
            ckpt_predicate=lambda each: each.meta["end-of-epoch"],
            max_num_checkpoints=number,
        )
        try:
            for name in names:
                mean = average_checkpoints(newest, name, _read_weights)
                self.recoverables[name].load_state_dict(mean)
        except Exception as error:  # of torch, whatever the bytes say
            places = first_ten([f"'{each.path}'" for each in newest])
            raise CheckpointError(
                f"{name} of the checkpoints {places} cannot be averaged "
                f"({type(error).__name__}: {one_line(error)[:300]}). Is one "
                "of them damaged?"
            ) from error

    # -- internals --------------------------------------------------------

    def _new_checkpoint_dirpath(self) -> Path:
        return _part(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name: str) -> Path:
        return _part(super()._custom_checkpoint_dirpath(name))

    def _save_checkpoint_metafile(
        self, fpath, meta_to_include=None, end_of_epoch=True
    ) -> dict:
        """Called first of all, on rank 0 only."""
        self._sweep(except_for=fpath.parent)
        meta = super()._save_checkpoint_metafile(fpath, {}, end_of_epoch)
        times = [ckpt_recency(each) for each in self.list_checkpoints()]
        # A clock that was set back must not make the newest look old.
        meta["unixtime"] = max([meta["unixtime"], *(t + 1e-3 for t in times)])
        return {**meta, **(meta_to_include or {}), "format": FORMAT}

    def _publish(self, part: Checkpoint) -> Checkpoint:
        """Checksums, sync, rename."""
        files = {
            file.name: checksum(file)
            for file in sorted(part.path.iterdir())
            if file.name != METAFNAME
        }
        meta = {**part.meta, "files": files}
        meta["checksum"] = checksum_of_meta(meta)
        write_meta(part.path / METAFNAME, meta)
        for file in part.path.iterdir():
            _sync(file)
        _sync(part.path)
        final = part.path.with_name(part.path.name[1:].rsplit("@", 2)[0])
        if final.exists():  # a name that the caller chose
            self._remove(final)
        part.path.rename(final)
        _sync(final.parent)
        self._damaged.pop(final, None)
        self._sound[final] = Checkpoint(
            final,
            meta,
            {
                name: final / file.relative_to(part.path)
                for name, file in part.paramfiles.items()
            },
        )
        return self._sound[final]

    def _remove(self, path: Path, verbosity=logging.INFO) -> None:
        """Out of sight first: removing many files can be cut short, too."""
        hidden = _part(path.with_name(f"{path.name}.old"))
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        self._sound.pop(path, None)
        shutil.rmtree(hidden)
        logger.log(verbosity, "Deleted checkpoint %s", path)

    def _sweep(self, except_for: Path | None = None) -> None:
        """Clear what a process that is gone left of a checkpoint."""
        if if_main_process():
            for part in self.checkpoints_dir.glob(".*.part"):
                if part != except_for and not _is_others(part):
                    shutil.rmtree(part, ignore_errors=True)

    def _has_no_room(self) -> bool:
        """Before a sweep; a full disk has room for a small file, perhaps."""
        folder = self.checkpoints_dir
        return folder.is_dir() and shutil.disk_usage(folder).free < 1e5

    def _why_not_written(self, error: Exception, full: bool) -> str:
        if not self.checkpoints_dir.is_dir():
            return (
                f"the folder of checkpoints, '{self.checkpoints_dir}', is "
                f"gone: {error}. Was it deleted or moved while training ran?"
            )
        free = shutil.disk_usage(self.checkpoints_dir).free
        last = self.find_checkpoint()
        kept = (
            "There is no older one."
            if last is None
            else f"The last checkpoint, '{last.path}', is intact."
        )
        why = "the disk is full: " if full else ""
        return (
            f"{why}a checkpoint in '{self.checkpoints_dir}' could not be "
            f"written ({free / 1e6:.1f} MB free): {error}. {kept} Mend that, "
            "then run the same command to continue."
        )


def _part(path: Path) -> Path:
    """The hidden name to write under, with the process that writes."""
    host = socket.gethostname()
    return path.with_name(f".{path.name}@{host}@{os.getpid()}.part")


def _is_others(part: Path) -> bool:
    """Whether a process that may be alive is still writing."""
    _, host, process = ["", "", *part.stem.rsplit("@", 2)][-3:]
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    if host != socket.gethostname():
        return True  # cannot be asked
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_of_writing(error: Exception) -> bool:
    if isinstance(error, CheckpointError):
        return False
    if isinstance(error, OSError):
        return True
    # What torch.save says, by the place where the writing stopped.
    return "inline_container" in str(error) or "iostream" in str(error)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that no space, or no quota, is left."""
    return isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
    )


def _read_weights(path, map_location):
    return torch.load(path, map_location, weights_only=True)
