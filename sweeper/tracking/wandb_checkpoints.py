"""Checkpoints as W&B artifacts, uploaded beside the rows by a thread of the tracker process.

Each run has one collection, `<wandb_run_id>-checkpoint`. A version holds everything that another
machine needs to make the run directory again; its metadata say which checkpoint it is. Nobody
waits for an upload: a newer checkpoint takes the place of one that has not begun, and the files
of those that wait are linked into a directory of their own, so that a prune does not take them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import checkpoints, fsops, rundir
from sweeper.errors import CheckpointRefused, SweeperError
from sweeper.manifests import MANIFEST, Manifest, read_manifest
from sweeper.tracking.messages import Begin
from sweeper.tracking.metrics import STEP, decode_row

if TYPE_CHECKING:
    import wandb

TYPE = "sweeper-checkpoint"
NEVER, LAST, BEST, ALL = "never", "last", "best", "all"

RETRY_S = 30.0
"""How long a checkpoint that could not be uploaded waits for its next try."""

LAST_TRIES = 2
"""How often one that fails is tried at the end of an attempt."""

MAX_WAITING = 16
"""With `all`, so many checkpoints wait at most: their files take room that a prune would give back."""

PAGE = 100
_API_TIMEOUT_S = 20
_CLOSE_S = 2.0
_JOIN_S = 0.05


def collection_name(wandb_run_id: str) -> str:
    """The artifact collection of a run's checkpoints."""
    return f"{wandb_run_id}-checkpoint"


# --- decisions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """A checkpoint that W&B has, as its metadata tell."""

    step: int
    lease_epoch: int
    manifest_digest: str
    value: float | None = None

    @classmethod
    def read(cls, metadata: object) -> Version | None:
        """What an artifact's metadata say; None when we did not write them."""
        if not isinstance(metadata, dict):
            return None
        step, epoch = metadata.get("step"), metadata.get("lease_epoch")
        digest, value = metadata.get("manifest_digest"), metadata.get("value")
        if type(step) is not int or type(epoch) is not int or not isinstance(digest, str):
            return None
        return cls(step, epoch, digest, float(value) if isinstance(value, int | float) else None)

    def is_overtaken(self, begin: Begin) -> bool:
        """Whether its owner had already lost the run: a later attempt went on from an earlier step."""
        return self.lease_epoch < begin.lease_epoch and self.step > begin.start_step


def is_better(value: float | None, than: float | None, *, direction: str) -> bool:
    """Whether a value of the metric improves on another one; nothing is worse than any value."""
    if value is None or value != value:
        return False
    if than is None:
        return True
    return value < than if direction == "minimize" else value > than


def best_value(versions: Iterable[Version], begin: Begin) -> float | None:
    """The best value among those that count."""
    best: float | None = None
    for version in versions:
        if not version.is_overtaken(begin) and is_better(version.value, best, direction=begin.direction):
            best = version.value
    return best


def decide_removal(versions: Iterable[Version], uploaded: Version, *, mode: str, begin: Begin) -> set[str]:
    """Digests of the versions that may go now that one more was committed.

    A newer owner's are never among them. With `last` the newest `keep_last` stay, with `best` only
    the one that was just uploaded, with `all` every one.
    """
    if mode == ALL:
        return set()
    mine = [version for version in versions if version.lease_epoch <= begin.lease_epoch]
    if mode == BEST:
        keep = {uploaded.manifest_digest}
    else:
        ranked = sorted(mine, key=lambda v: (not v.is_overtaken(begin), v.lease_epoch, v.step), reverse=True)
        keep = {version.manifest_digest for version in ranked[: begin.keep_last]}
    return {version.manifest_digest for version in mine} - keep


# --- what is on disk -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Waiting:
    """A committed checkpoint that is to be uploaded.

    Attributes:
        links: Second names of its files; None where the file system has no hard links.
    """

    manifest: Manifest
    directory: Path
    committed_at: str
    links: Path | None

    @property
    def version(self) -> Version:
        manifest = self.manifest
        return Version(manifest.step, manifest.lease_epoch, manifest.digest, manifest.value)


def committed(directory: Path, begin: Begin) -> Manifest:
    """The manifest of a whole checkpoint of this run, with the sizes checked; digests are the reader's.

    Raises:
        CheckpointRefused: It is not one.
        OSError: It cannot be read, or a prune has taken it.
    """
    manifest = read_manifest(directory)
    starts = [(begin.lease_epoch, begin.start_step)]
    if manifest.run_id != begin.run_id or directory.name != checkpoints.step_name(manifest.step):
        raise CheckpointRefused("it is not this run's")
    if manifest.lease_epoch > begin.lease_epoch or checkpoints.overtaken_by(manifest, starts):
        raise CheckpointRefused("it is another attempt's")
    for name, (size, _) in manifest.files.items():
        status = os.lstat(directory / name)
        if not checkpoints.is_file_name(name) or not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise CheckpointRefused(f"{name} is not what was written")
    return manifest


def _names(manifest: Manifest) -> list[str]:
    return [*manifest.files, MANIFEST]


def assemble(waiting: Waiting, run_dir: Path, target: Path) -> dict[str, Path]:
    """Put together what one version holds: name in the run directory → file.

    Only what differs from checkpoint to checkpoint is written anew, into `target`.

    Raises:
        OSError, SweeperError: Something of it is not there, or not what was written.
    """
    step = checkpoints.step_name(waiting.manifest.step)
    if waiting.links is None:
        source = target / step
        source.mkdir()
        for name in _names(waiting.manifest):
            shutil.copyfile(waiting.directory / name, source / name)
    else:
        source = waiting.links
    root = rundir.CHECKPOINTS_DIR
    files = {f"{root}/{step}/{name}": source / name for name in _names(waiting.manifest)}
    for name in (rundir.RUN_FILE, rundir.OVERRIDES_FILE, rundir.CONFIG_FILE):
        files[name] = target / name
        files[name].write_bytes(rundir.read_bytes(run_dir / name))
    files[rundir.METRICS_FILE] = target / rundir.METRICS_FILE
    _cut_metrics(run_dir / rundir.METRICS_FILE, files[rundir.METRICS_FILE], source, waiting.manifest.step)
    state = {"name": "train", "state": "running", "global_step": waiting.manifest.step}
    for name, data in {
        checkpoints.STAGES: {"schema_version": 1, "stages": [state]},
        checkpoints.POINTER: checkpoints.pointer(waiting.manifest, committed_at=waiting.committed_at),
    }.items():
        files[f"{root}/{name}"] = target / name
        files[f"{root}/{name}"].write_bytes(rundir.to_json(data))
    return files


def _cut_metrics(log: Path, target: Path, checkpoint: Path, step: int) -> None:
    """Copy the rows that the checkpoint knows of: up to its offset, else up to its step."""
    try:
        fd = os.open(log, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        target.touch()
        return
    try:
        offset = _offset(checkpoint)
        if offset is None:
            with open(fd, "rb", closefd=False) as lines:
                offset = sum(_sizes_until(lines, step))
        if os.fstat(fd).st_size < offset:
            raise SweeperError(f"{log.name} is shorter than the {offset} bytes that the checkpoint knows of")
        fsops.copy_prefix(Path(f"/proc/self/fd/{fd}"), target, offset)
    finally:
        os.close(fd)


def _offset(checkpoint: Path) -> int | None:
    try:
        offset = rundir.read_json(checkpoint / "state.json").get("metrics_offset")
    except (FileNotFoundError, rundir.Damaged):
        return None
    return offset if type(offset) is int and offset >= 0 else None


def _sizes_until(lines: Iterable[bytes], step: int) -> Iterator[int]:
    for line in lines:
        row = decode_row(line)
        if not line.endswith(b"\n") or (row is not None and int(row[STEP]) > step):
            return
        yield len(line)


# --- what is at W&B ------------------------------------------------------------------------


class _Stream:
    """A channel into the W&B service for artifacts only.

    An artifact that is logged through the run itself holds back the run's end until it is
    uploaded. This channel knows no run: it sends no rows, and says nothing about a state.

    HAZARD: these are inner interfaces of wandb 0.31, as used by its own artifact downloads.
    """

    def __init__(self, run: wandb.Run, directory: Path) -> None:
        from wandb.sdk import wandb_setup

        self._run: Any = run
        self._directory = directory
        self._service: Any = wandb_setup.singleton().ensure_service()
        self._id = f"{run.id}-checkpoints-{secrets.token_hex(4)}"
        settings: Any = self._run._settings.to_proto()
        settings.x_skip_transaction_log.value = True
        for name, file in _STREAM_FILES.items():
            getattr(settings, name).value = str(directory / file)
        self._interface: Any = self._service.inform_init(settings=settings, run_id=self._id)

    def upload(self, artifact: wandb.Artifact, aliases: list[str]) -> None:
        """Upload and commit; waits until that is done. Raises what the client raises."""
        os.environ["WANDB_DATA_DIR"] = str(self._directory)  # where the client puts its own manifest
        artifact.finalize()
        handle = self._interface.deliver_artifact(self._run, artifact, aliases)
        answer = handle.wait_or(timeout=None).response.log_artifact_response
        if answer.error_message:
            raise SweeperError(answer.error_message)

    def close(self) -> None:
        """Close it when nothing is under way."""
        # Without an exit the service would wait for ever, and with it all other channels.
        self._interface.deliver_exit(0).wait_or(timeout=_CLOSE_S)
        self._service.inform_finish(self._id)


_STREAM_FILES = {
    "sync_dir": "",
    "sync_file": "run.wandb",
    "log_dir": "",
    "log_internal": "debug-internal.log",
    "log_user": "debug.log",
}


class _Collection:
    """A run's artifact collection, through the public API. Each method may raise anything."""

    def __init__(self, run: wandb.Run, name: str) -> None:
        self._path = f"{run.entity}/{run.project}/{name}"
        self._api: Any = None

    def versions(self, *, limit: int | None) -> list[tuple[Version, Any]]:
        """Committed versions that are ours to read, with their artifacts."""
        import wandb

        if self._api is None:
            self._api = wandb.Api(timeout=_API_TIMEOUT_S)
        if not self._api.artifact_collection_exists(self._path, TYPE):
            return []
        found = []
        for number, artifact in enumerate(self._api.artifacts(TYPE, self._path, per_page=PAGE)):
            if limit is not None and number >= limit:
                break
            version = Version.read(artifact.metadata)
            if version is not None:
                found.append((version, artifact))
        return found


# --- the uploader --------------------------------------------------------------------------


class Superseded(SweeperError):
    """The run has a newer owner, here or at W&B: nothing more is uploaded."""


class CheckpointUploader:
    """Uploads the checkpoints of one attempt, at most one at a time.

    Failures are warnings: the training's checkpoints are on disk in any case.

    Args:
        run: The attempt's W&B run; offline, nothing is uploaded.
        begin: The attempt; `settings.wandb.upload_checkpoints` says which checkpoints.
        warn: Takes texts for people; called in the caller's thread only.
    """

    def __init__(self, run: wandb.Run, begin: Begin, *, warn: Callable[[str], None]) -> None:
        self._run, self._begin, self._warn = run, begin, warn
        self._mode = begin.settings.wandb.upload_checkpoints
        self._run_dir = Path(begin.run_dir)
        self._root = self._run_dir / rundir.CHECKPOINTS_DIR
        self._seen: set[tuple[int, int]] = set()
        self._waiting: deque[Waiting] = deque()
        self._best: float | None = None
        self._job: _Job | None = None
        self._retry_at_s = 0.0
        self._num_failures = 0
        self._tries_left = 0
        self._uploads: _Uploads | None = None
        self._is_over = self._mode == NEVER
        if not self._is_over and run.offline:
            self._is_over = True
            warn(f"{begin.run_id}: no checkpoints are uploaded while W&B is offline")

    def pump(self) -> None:
        """See what was committed and what was uploaded; never waits for W&B."""
        if self._is_over:
            return
        try:
            self._settle()
            self._look()
            self._start(is_patient=True)
        except Exception as error:  # noqa: BLE001 - rows go on, whatever becomes of checkpoints
            self._give_up(f"checkpoints are no longer uploaded to W&B: {_text(error)}")

    def finish(self, timeout_s: float) -> bool:
        """Upload what is newest, for at most `timeout_s` seconds.

        Returns:
            False if an upload is still under way: the caller ends the service.
        """
        deadline_s = time.monotonic() + timeout_s
        self._tries_left = LAST_TRIES
        try:
            while self._is_busy() and time.monotonic() < deadline_s:
                if self._job is not None:
                    self._job.join(min(_JOIN_S, max(0.0, deadline_s - time.monotonic())))
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(f"checkpoints are no longer uploaded to W&B: {_text(error)}")
        is_idle = self._job is None
        if not is_idle or self._waiting:
            step = self._job.waiting.manifest.step if self._job else self._waiting[0].manifest.step
            self._warn(
                f"{self._begin.run_id}: the checkpoint of step {step} was not uploaded to W&B in {timeout_s:g} s"
            )
        if is_idle and self._uploads is not None:
            with contextlib.suppress(Exception):
                self._uploads.close()
        self.abandon()
        return is_idle

    def abandon(self) -> None:
        """Let go at once; what is under way ends with the service, and is never committed in part."""
        self._is_over = True
        self._waiting.clear()
        if self._uploads is not None:
            self._uploads.remove()

    # --- in the caller's thread ------------------------------------------------------------

    def _is_busy(self) -> bool:
        """At the end: whether an upload is under way, after beginning the next one."""
        if not self._is_over:
            self._settle()
        if not self._is_over:
            self._look()
            self._start(is_patient=self._tries_left <= 0)
        return self._job is not None and not self._is_over

    def _settle(self) -> None:
        """Take note of how an upload ended."""
        job = self._job
        if job is None or job.is_alive():
            return
        self._job = None
        if job.error is None:
            self._num_failures = 0
            for text in job.notes:
                self._warn(f"{self._begin.run_id}: {text}")
        elif isinstance(job.error, Superseded):
            self._give_up(str(job.error))
            return
        else:
            self._num_failures += 1
            self._tries_left -= 1
            step = job.waiting.manifest.step
            if self._num_failures == 1:
                self._warn(
                    f"{self._begin.run_id}: the checkpoint of step {step} was not uploaded to W&B: {_text(job.error)}"
                )
            if not self._waiting or self._mode == ALL:
                self._retry_at_s = time.monotonic() + RETRY_S
                self._waiting.appendleft(job.waiting)
                return
        self._uploader().discard(job.waiting)

    def _look(self) -> None:
        """Have the files of new checkpoints kept, as far as they are wanted."""
        there = _directories(self._root)
        new = [path for key, path in there.items() if key not in self._seen]
        self._seen = set(there)
        for path in new[-1:] if self._mode == LAST else new:
            try:
                manifest = committed(path, self._begin)
            except (CheckpointRefused, OSError):
                continue
            if self._is_wanted(manifest):
                self._keep(manifest, path)

    def _is_wanted(self, manifest: Manifest) -> bool:
        if self._mode != BEST:
            return True
        if not is_better(manifest.value, self._best, direction=self._begin.direction):
            return False
        self._best = manifest.value
        return True

    def _keep(self, manifest: Manifest, directory: Path) -> None:
        try:
            waiting = self._uploader().keep(manifest, directory)
        except FileNotFoundError:
            return  # a prune took it
        limit = MAX_WAITING if self._mode == ALL else 1
        while len(self._waiting) >= limit:
            oldest = self._waiting.popleft()
            self._uploader().discard(oldest)
            if self._mode == ALL:
                step = oldest.manifest.step
                self._warn(
                    f"{self._begin.run_id}: the checkpoint of step {step} is not uploaded: W&B is too slow"
                )
        self._waiting.append(waiting)

    def _start(self, *, is_patient: bool) -> None:
        if self._job is not None or not self._waiting:
            return
        if is_patient and time.monotonic() < self._retry_at_s and self._num_failures:
            return
        self._job = _Job(self._uploader(), self._waiting.popleft())
        self._job.start()

    def _give_up(self, why: str) -> None:
        self._warn(f"{self._begin.run_id}: {why}")
        self.abandon()

    def _uploader(self) -> _Uploads:
        if self._uploads is None:
            self._uploads = _Uploads(self._run, self._begin)
        return self._uploads


class _Job(threading.Thread):
    """One upload. `error` and `notes` are read when the thread has ended."""

    def __init__(self, uploads: _Uploads, waiting: Waiting) -> None:
        super().__init__(name=f"checkpoint-{waiting.manifest.step}", daemon=True)
        self._uploads, self.waiting = uploads, waiting
        self.error: BaseException | None = None
        self.notes: list[str] = []

    def run(self) -> None:
        try:
            self.notes = self._uploads.upload(self.waiting)
        except BaseException as error:  # noqa: BLE001 - foreign code; wandb may raise SystemExit, too
            self.error = error


class _Uploads:
    """Private files, and what one job after the other does with them and W&B."""

    def __init__(self, run: wandb.Run, begin: Begin) -> None:
        self._run, self._begin = run, begin
        self._run_dir = Path(begin.run_dir)
        self._mode = begin.settings.wandb.upload_checkpoints
        self._name = collection_name(begin.wandb_run_id)
        self._collection = _Collection(run, self._name)
        self._stream: _Stream | None = None
        self._known: set[str] | None = None
        self._number = 0
        for left in self._run_dir.glob(f"{rundir.UPLOADS}*.tmp"):  # by a tracker that was killed
            fsops.remove_tree(left)
        # A name that the run's next owner removes, should this process be killed.
        self._directory = fsops.temporary_name(self._run_dir / rundir.UPLOADS.strip("."))
        self._directory.mkdir(mode=0o700)

    # --- files, in the caller's thread -----------------------------------------------------

    def keep(self, manifest: Manifest, directory: Path) -> Waiting:
        """Give the checkpoint's files second names. Raises FileNotFoundError when a prune was faster."""
        committed_at = datetime.fromtimestamp(directory.stat().st_mtime, UTC).isoformat(timespec="seconds")
        self._number += 1
        links = self._directory / f"kept-{self._number}"
        links.mkdir()
        try:
            for name in _names(manifest):
                os.link(directory / name, links / name)
        except FileNotFoundError:
            shutil.rmtree(links)
            raise
        except OSError:  # no hard links here
            shutil.rmtree(links)
            return Waiting(manifest, directory, committed_at, None)
        return Waiting(manifest, directory, committed_at, links)

    def discard(self, waiting: Waiting) -> None:
        """Let go of the second names."""
        if waiting.links is not None:
            shutil.rmtree(waiting.links, ignore_errors=True)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- W&B, in a job's thread ------------------------------------------------------------

    def upload(self, waiting: Waiting) -> list[str]:
        """Upload one checkpoint unless W&B has it, then remove old versions; returns notes for people.

        Raises:
            Superseded: The run has a newer owner.
            Exception: Whatever the client raises; nothing was committed.
        """
        there = [version for version, _ in self._list()]
        mine = waiting.version
        if self._known is not None and mine.manifest_digest in self._known:
            return []
        is_best = is_better(mine.value, best_value(there, self._begin), direction=self._begin.direction)
        if self._mode == BEST and not is_best:
            return []
        self._send(waiting, ["latest", f"step-{mine.step:08d}", *(["best"] if is_best else [])])
        self._known = (self._known or set()) | {mine.manifest_digest}
        try:
            self._remove_old(mine)
        except Superseded:
            raise
        except Exception as error:  # noqa: BLE001 - foreign code; the next upload tries again
            return [f"old checkpoints could not be removed from W&B: {_text(error)}"]
        return []

    def close(self) -> None:
        """Close the channel."""
        if self._stream is not None:
            self._stream.close()

    def _list(self) -> list[tuple[Version, Any]]:
        """What W&B has: all of it once, later what is newest."""
        if rundir.largest_epoch(self._run_dir) > self._begin.lease_epoch:
            raise Superseded("no more checkpoints are uploaded: the run has a newer owner")
        found = self._collection.versions(limit=None if self._known is None else PAGE)
        if self._known is None:
            self._known = {version.manifest_digest for version, _ in found}
        newest = max((version.lease_epoch for version, _ in found), default=0)
        if newest > self._begin.lease_epoch:
            raise Superseded(
                f"no more checkpoints are uploaded: at W&B the run has gone on elsewhere (lease epoch {newest})"
            )
        return found

    def _send(self, waiting: Waiting, aliases: list[str]) -> None:
        import wandb

        version = waiting.version
        metadata = {
            "run_id": self._begin.run_id,
            "step": version.step,
            "lease_epoch": version.lease_epoch,
            "manifest_digest": version.manifest_digest,
            "mode": self._mode,
            "value": version.value,
        }
        self._number += 1
        target = self._directory / f"sent-{self._number}"
        target.mkdir()
        try:
            artifact = wandb.Artifact(self._name, TYPE, metadata=metadata)
            for name, path in assemble(waiting, self._run_dir, target).items():
                # Immutable: nobody writes to these files, so that the client need not copy them.
                artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
            if self._stream is None:
                self._stream = _Stream(self._run, self._directory)
            self._stream.upload(artifact, aliases)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _remove_old(self, uploaded: Version) -> None:
        found = self._list()
        if uploaded.manifest_digest not in {version.manifest_digest for version, _ in found}:
            return  # W&B does not show it yet: the next upload removes what is old by then
        doomed = decide_removal(
            [version for version, _ in found], uploaded, mode=self._mode, begin=self._begin
        )
        for version, artifact in found:
            if version.manifest_digest in doomed:
                artifact.delete(delete_aliases=True)


def _directories(root: Path) -> dict[tuple[int, int], Path]:
    """(step, inode) → checkpoint on disk, oldest first; one that a prune takes meanwhile is left out."""
    found = {}
    for step, path in reversed(checkpoints.steps_on_disk(root)):
        with contextlib.suppress(FileNotFoundError):
            found[step, path.stat().st_ino] = path
    return found


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
