"""A run directory held still: open files of one moment, which a prune meanwhile takes nothing from.

The owner goes on saving and pruning. What is open stays readable when its name is gone, so
nothing has to be linked, locked or waited for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sweeper import checkpoints, fsops, images, rundir
from sweeper.errors import CheckpointRefused
from sweeper.manifests import MANIFEST, Manifest, read_manifest
from sweeper.recovery import final_state
from sweeper.rundir import Damaged
from sweeper.states import State

MAX_LOG_BYTES = 16 << 20
"""A log of an attempt that is longer is not copied."""


class Torn(Exception):
    """The directory changed while it was looked at; look again."""


@dataclass(slots=True)
class Held:
    """One open file."""

    size_bytes: int
    digest: str
    fd: int


@dataclass(slots=True)
class Snapshot:
    """One moment of a run.

    Attributes:
        files: Name in the run directory → open file.
        manifest: Of the newest valid checkpoint.
        result_epoch: The lease epoch of its result; None when it has none.
        refused: Checkpoints that are not copied, and why.
    """

    files: dict[str, Held] = field(default_factory=dict)
    manifest: Manifest | None = None
    result_epoch: int | None = None
    refused: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Let go of the files."""
        for held in self.files.values():
            os.close(held.fd)
        self.files = {}

    def hold(self, name: str, path: Path) -> None:
        """Open one file, and find its digest."""
        self._add(name, _open(path))

    def hold_prefix(self, name: str, path: Path, size_bytes: int | None) -> None:
        """Hold the first bytes of a file that grows; None: all there are now."""
        whole = _open(path)
        try:
            size = os.fstat(whole).st_size
            self._add(name, _cut(whole, size if size_bytes is None else min(size, size_bytes)))
        finally:
            os.close(whole)

    def _add(self, name: str, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            self.files[name] = Held(size, images.digest_of(fd, size), fd)
        except BaseException:
            os.close(fd)
            raise


@contextlib.contextmanager
def taken(run_dir: Path, *, attempt: int, is_over: bool) -> Iterator[Snapshot]:
    """Hold a run still.

    Args:
        run_dir: The run directory.
        attempt: The attempt that goes on; logs of those before it are complete.
        is_over: So is its own log.

    Raises:
        Torn: It has changed meanwhile; try again.
        OSError, Damaged: It cannot be read.
    """
    snapshot = Snapshot()
    try:
        try:
            _hold_all(snapshot, run_dir, attempt=attempt, is_over=is_over)
        except FileNotFoundError as error:
            raise Torn(str(error)) from error
        yield snapshot
    finally:
        snapshot.close()


def _hold_all(snapshot: Snapshot, run_dir: Path, *, attempt: int, is_over: bool) -> None:
    for name in (rundir.RUN_FILE, rundir.CONFIG_FILE, rundir.OVERRIDES_FILE):
        snapshot.hold(name, run_dir / name)
    snapshot.result_epoch = result_epoch(run_dir)
    offset = _hold_checkpoint(snapshot, run_dir)
    is_final = snapshot.result_epoch is not None
    if is_final:
        snapshot.hold(rundir.RESULT_FILE, run_dir / rundir.RESULT_FILE)
        offset = None  # the rows after the last checkpoint are for good as well
    log = run_dir / rundir.METRICS_FILE
    if log.exists():
        snapshot.hold_prefix(rundir.METRICS_FILE, log, offset)
    stages = run_dir / rundir.CHECKPOINTS_DIR / checkpoints.STAGES
    if stages.exists():
        snapshot.hold(f"{rundir.CHECKPOINTS_DIR}/{checkpoints.STAGES}", stages)
    for number in range(1, attempt + is_over):
        log = rundir.attempt_log(run_dir, number)
        if log.exists() and log.stat().st_size <= MAX_LOG_BYTES:
            snapshot.hold(f"{rundir.LOGS_DIR}/{log.name}", log)


def _hold_checkpoint(snapshot: Snapshot, run_dir: Path) -> int | None:
    """Hold the newest valid checkpoint; returns how long the metrics log was when it was taken."""
    root = run_dir / rundir.CHECKPOINTS_DIR
    starts = checkpoints.known_starts(root)
    for step, directory in checkpoints.steps_on_disk(root):
        held = Snapshot()
        try:
            manifest = _hold_valid(held, directory, run_id=run_dir.name, starts=starts)
        except (CheckpointRefused, Damaged, OSError) as error:
            held.close()
            # A prune or a new owner renames it as a whole; what lacks only a file is damaged.
            if not directory.exists():
                raise Torn(str(error)) from error
            snapshot.refused.append(f"checkpoint step {step} is not copied: {error}")
            continue
        except BaseException:
            held.close()
            raise
        snapshot.files |= {
            f"{rundir.CHECKPOINTS_DIR}/{directory.name}/{n}": one for n, one in held.files.items()
        }
        snapshot.manifest = manifest
        return _metrics_offset(held.files.get("state.json"))
    return 0


def _hold_valid(held: Snapshot, directory: Path, *, run_id: str, starts: set[tuple[int, int]]) -> Manifest:
    manifest = read_manifest(directory)
    if overtaken := checkpoints.overtaken_by(manifest, starts):
        raise CheckpointRefused(overtaken)
    if manifest.run_id != run_id or checkpoints.step_name(manifest.step) != directory.name:
        raise CheckpointRefused("it is another one's")
    held.hold(MANIFEST, directory / MANIFEST)
    for name, (size, digest) in manifest.files.items():
        held.hold(name, directory / name)
        if (held.files[name].size_bytes, held.files[name].digest) != (size, digest):
            raise CheckpointRefused(f"{name} is not what its manifest says")
    return manifest


def _metrics_offset(state: Held | None) -> int | None:
    """How many bytes of the metrics log belong to a checkpoint; None: all there are."""
    try:
        value = json.loads(os.pread(state.fd, state.size_bytes, 0))["metrics_offset"] if state else None
    except (ValueError, KeyError, TypeError):
        return None
    return value if type(value) is int and value >= 0 else None


def result_epoch(run_dir: Path) -> int | None:
    """The lease epoch of a run's final result; None when it has none that counts."""
    try:
        result = rundir.read_result(run_dir)
    except Damaged:
        return None
    if result is None or not (final_state(result) or result.get("state") == State.SUPERSEDED):
        return None
    epoch = result.get("lease_epoch")
    return epoch if type(epoch) is int and epoch >= rundir.largest_epoch(run_dir) else None


def _open(path: Path) -> int:
    fsops.probe("open", path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(f"{path} is a link") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(f"{path} is not a regular file")
    return fd


def _cut(fd: int, size_bytes: int) -> int:
    """The first bytes of an open file as an open file of its own, which has no name."""
    with tempfile.TemporaryFile() as file:
        done = 0
        while done < size_bytes and (count := os.sendfile(file.fileno(), fd, done, size_bytes - done)):
            done += count
        return os.dup(file.fileno())
