"""A run directory from elsewhere: fetched beside its place, checked to the last byte, renamed into place.

Whoever can write to the source may be hostile: names lead nowhere else, sizes are bounded, and
nothing is seen by anybody before all of it was checked. What a checkpoint holds is checked
against its manifest; that the manifest is of this run, against run.json.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sweeper import checkpoints, fsops, images, processes, rundir
from sweeper.errors import CheckpointRefused, ConfigError, Released, SweeperError
from sweeper.manifests import MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_manifest
from sweeper.recovery import final_state
from sweeper.rundir import Damaged, Identity
from sweeper.states import State

MAX_FILES = 10_000
"""Files of one run."""

MAX_RUN_BYTES = 1 << 40
"""Bytes of one run, 1 TiB; and never more than the disk has room for."""

MAX_TRIES = 3
"""How often a run is listed anew because a file that was listed has gone."""

ASIDE_DIR = "aside"
"""Beside `runs`: directories that something newer took the place of."""

_NEEDED = (rundir.RUN_FILE, rundir.CONFIG_FILE, rundir.OVERRIDES_FILE)
_STAGES = f"{rundir.CHECKPOINTS_DIR}/{checkpoints.STAGES}"
_POINTER = f"{rundir.CHECKPOINTS_DIR}/{checkpoints.POINTER}"
_LOG_NAME = re.compile(rf"{rundir.LOGS_DIR}/attempt_[0-9]{{4,8}}\.log\Z")
_STEP_FILE = re.compile(rf"{rundir.CHECKPOINTS_DIR}/(step_[0-9]{{8,12}})/([^/]+)\Z")
_LOCK_FILE = ".arrivals.lock"


_T = TypeVar("_T")


class Unsafe(SweeperError):
    """A listing names files that no run directory has, or more of them than are taken."""


class Gone(SweeperError):
    """A file that was listed is there no longer: its run was copied anew meanwhile; list it again."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a source says of a file before it is fetched. Whatever is known is checked.

    Attributes:
        digest: BLAKE3, hexadecimal.
    """

    size_bytes: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one run, by their names in the run directory, e.g. `checkpoints/step_00000010/model.pth`.

    Attributes:
        lease_epoch: The largest that the source knows of; 0 if it does not.
        attempt: Number of the last attempt that it knows of.
    """

    files: Mapping[str, Listed]
    lease_epoch: int = 0
    attempt: int = 0


class Source(Protocol):
    """Where run directories come from. Each method may raise OSError or SweeperError."""

    @property
    def name(self) -> str:
        """For people, e.g. `the copy s3://bucket/simple`."""

    def run_ids(self, sweep: str) -> Sequence[str]:
        """The runs of a sweep that are there."""

    def listing(self, run_id: str) -> Listing:
        """What there is of one run, now."""

    def fetch(self, run_id: str, name: str, target: Path, *, limit_bytes: int) -> None:
        """Write one listed file to the new file `target`, and stop beyond `limit_bytes`.

        Raises:
            Gone: It is not there any more.
        """


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of one run.

    Attributes:
        is_new: It was put in place; else what was here already is at least as far, and was kept.
        step: Its newest valid checkpoint.
        notes: What was left out, and why, for people.
    """

    run_id: str
    directory: Path
    is_new: bool
    step: int | None
    is_final: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        far = (
            "finished" if self.is_final else f"step {self.step}" if self.step is not None else "no checkpoint"
        )
        did = f"fetched ({far})" if self.is_new else f"kept as it is here ({far})"
        return f"{self.run_id}: {did}"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source has of one run, of which nothing is put in place yet.

    Attributes:
        is_wanted: It would be fetched; else what is here already is at least as far.
        standing: As the source tells of it; no checkpoint was looked into.
        config: Its configuration.
    """

    run_id: str
    is_wanted: bool
    standing: Standing
    size_bytes: int
    config: dict[str, Any]


# --- what is taken -------------------------------------------------------------------------


def check_names(run_id: str, files: Mapping[str, Listed]) -> tuple[list[str], list[str]]:
    """The names that are fetched, and those that are left alone because no run directory has them.

    Raises:
        Unsafe: A name could lead out of the directory, or there is too much of it all.
    """
    for name in files:
        if why := _danger(name):
            raise Unsafe(f"run {run_id}: the file name {name[:200]!r} is refused", why=why)
    if len(files) > MAX_FILES:
        raise Unsafe(f"run {run_id} has {len(files)} files", why=f"more than {MAX_FILES} are not taken")
    total = sum(listed.size_bytes or 0 for listed in files.values())
    if total > MAX_RUN_BYTES or any((listed.size_bytes or 0) < 0 for listed in files.values()):
        raise Unsafe(f"run {run_id} has {total} bytes", why=f"more than {MAX_RUN_BYTES} are not taken")
    known = sorted(name for name in files if _is_known(name))
    return known, sorted(set(files) - set(known))


def _danger(name: object) -> str:
    if not isinstance(name, str) or not name or len(name) > 300:
        return "it is empty, too long or no text"
    if not (name.isascii() and name.isprintable()) or "\\" in name:
        return "it has a character that no name of ours has"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it leads elsewhere"
    return ""


def _is_known(name: str) -> bool:
    if name in (*_NEEDED, rundir.METRICS_FILE, rundir.RESULT_FILE, _STAGES, _POINTER):
        return True
    match = _STEP_FILE.match(name)
    return bool(_LOG_NAME.match(name) or (match and checkpoints.is_file_name(match[2])))


def _by_step(names: Sequence[str]) -> dict[str, list[str]]:
    """`step_00000010` → names of its files; newest first, only those with a manifest."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _STEP_FILE.match(name):
            found.setdefault(match[1], []).append(match[2])
    whole = {step: files for step, files in found.items() if MANIFEST in files}
    return dict(sorted(whole.items(), key=lambda item: int(item[0][5:]), reverse=True))


# --- what is here already ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run directory is, here or elsewhere. `identity` is None when run.json cannot be read."""

    identity: Identity | None
    lease_epoch: int
    is_final: bool
    step: int | None

    @property
    def order(self) -> tuple[int, bool, int]:
        """The newest owner's copy counts, then a finished one, then the one that is further."""
        return self.lease_epoch, self.is_final, -1 if self.step is None else self.step


class Verdict(StrEnum):
    """What to do with a run that is offered."""

    FETCH = "fetch"
    KEEP = "keep"
    REPLACE = "replace"
    REFUSE = "refuse"


def decide(here: Standing | None, offered: Standing, *, overwrite: bool) -> tuple[Verdict, str]:
    """What to do with an offered run, and why."""
    if here is None:
        return Verdict.FETCH, "there is none here"
    if here.identity is not None and here.identity == offered.identity and here.order >= offered.order:
        return Verdict.KEEP, "what is here is the same run, and at least as far"
    if here.identity is None:
        reason = "its run.json cannot be read"
    elif here.identity != offered.identity:
        reason = "it is another run of the same name"
    else:
        reason = "it is the same run, but not as far"
    return (Verdict.REPLACE if overwrite else Verdict.REFUSE), reason


def standing_of(run_dir: Path) -> Standing | None:
    """How far the run directory here is; None when there is none."""
    if not os.path.lexists(run_dir):
        return None
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a directory", do="Move it away; nothing was changed.")
    try:
        identity = rundir.read_identity(run_dir)
    except (FileNotFoundError, Damaged):
        identity = None
    epoch = rundir.largest_epoch(run_dir)
    result = _result(run_dir, least_epoch=epoch)[0]
    step = checkpoints.newest_valid(run_dir / rundir.CHECKPOINTS_DIR, run_id=run_dir.name)
    return Standing(identity, epoch, result is not None, step)


def _result(run_dir: Path, *, least_epoch: int) -> tuple[State | None, str]:
    """The final state that result.json tells of, or None and why it does not count."""
    try:
        result = rundir.read_result(run_dir)
    except Damaged as error:
        return None, str(error)
    if result is None:
        return None, ""
    is_superseded = result.get("state") == State.SUPERSEDED
    state = State.SUPERSEDED if is_superseded else final_state(result)
    epoch = result.get("lease_epoch")
    if state is None or result.get("run_id") != run_dir.name:
        return None, "it is not this run's result"
    if type(epoch) is not int or epoch < least_epoch:
        return None, f"it is of lease epoch {epoch}, and the run has gone on to {least_epoch}"
    return state, ""


# --- fetching ------------------------------------------------------------------------------


def fetch_sweep(
    source: Source,
    sweep: str,
    *,
    data_dir: Path,
    overwrite: bool = False,
    num_checkpoints: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Arrival]:
    """Fetch every run of a sweep; one that is damaged or unsafe is left out, and said so.

    Raises:
        ConfigError: A directory here stands in the way.
        SweeperError: There are runs, and all of them were left out; or the source cannot be read.
    """

    def fetch(run_id: str) -> Arrival:
        arrival = fetch_run(
            source, run_id, sweep=sweep, data_dir=data_dir, overwrite=overwrite, num_checkpoints=num_checkpoints
        )  # fmt: skip
        for text in (str(arrival), *(f"{run_id}: {note}" for note in arrival.notes)):
            say(text)
        return arrival

    return _each(source, sweep, fetch, say)


def look_at_sweep(source: Source, sweep: str, *, data_dir: Path) -> list[Offer]:
    """What `fetch_sweep` would find: nothing is put in place, and no weights are read.

    Raises:
        ConfigError, SweeperError: As `fetch_sweep` would, as far as that can be told already.
    """

    def look(run_id: str) -> Offer:
        return _receive(source, run_id, sweep, data_dir, lambda incoming, target: incoming.look(target))

    offers = _each(source, sweep, look, lambda text: None)
    _need_room(f"sweep {sweep}", sum(offer.size_bytes for offer in offers if offer.is_wanted), data_dir)
    return offers


def _each(source: Source, sweep: str, act: Callable[[str], _T], say: Callable[[str], None]) -> list[_T]:
    """Act on each run of a sweep. Raises what the last one that was left out had, if none is left."""
    found: list[_T] = []
    refused: SweeperError | None = None
    for run_id in sorted(source.run_ids(sweep)):
        try:
            found.append(act(run_id))
        except (Damaged, Unsafe) as error:
            refused = error
            say(f"run {run_id[:100]} is left out: {error}")
    if refused is not None and not found:
        raise refused
    return found


def fetch_run(
    source: Source,
    run_id: str,
    *,
    data_dir: Path,
    sweep: str | None = None,
    overwrite: bool = False,
    num_checkpoints: int | None = None,
) -> Arrival:
    """Fetch one run into `<data_dir>/sweep/<sweep>/runs/<run_id>`, whole and checked, or not at all.

    Args:
        source: Where it comes from.
        run_id: Which; its sweep follows from it.
        sweep: The sweep it must belong to, if that is known.
        overwrite: Move a directory aside that is another run's, or not as far.
        num_checkpoints: Fetch no more than so many valid ones, the newest; default: all.

    Raises:
        ConfigError: A directory here stands in the way, or the disk has no room.
        Unsafe: The listing has names or sizes that are not taken.
        Damaged: run.json, config.yaml or the overrides are not this run's.
        Released: Somebody else is fetching into this data directory.
        OSError, SweeperError: The source cannot be read.
    """
    return _receive(
        source, run_id, sweep, data_dir,
        lambda incoming, target: incoming.receive(target, overwrite=overwrite, num_checkpoints=num_checkpoints),
    )  # fmt: skip


def _receive(
    source: Source, run_id: str, sweep: str | None, data_dir: Path, act: Callable[[_Incoming, Path], _T]
) -> _T:
    """List a run and act on it, in a private directory beside its place; anew when files have gone."""
    match = rundir.RUN_ID.match(run_id)
    if not match or sweep not in (None, match[1]):
        raise Unsafe(f"{run_id[:100]!r} is not the id of a run of {'any sweep' if sweep is None else sweep}")
    target = data_dir / rundir.relative_path(match[1], int(match[2]))
    rundir.make_parents(target)
    with _exclusively(target.parent):
        for remaining in reversed(range(MAX_TRIES)):
            private = fsops.temporary_name(target)
            fsops.make_dir(private)
            try:
                return act(_Incoming(source, run_id, source.listing(run_id), private / run_id), target)
            except Gone:
                if not remaining:
                    raise
            finally:
                with contextlib.suppress(OSError):
                    fsops.remove_tree(private)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _exclusively(runs_dir: Path) -> Iterator[None]:
    """One fetching process a sweep. What a crash left of an earlier one is removed."""
    busy = Released(f"somebody else is fetching runs into {runs_dir}", do="Wait for it, or end it.")
    with fsops.held(runs_dir / _LOCK_FILE, busy=busy):
        for name in os.listdir(runs_dir):
            if fsops.is_temporary(name):
                fsops.remove_tree(runs_dir / name)
        yield


@dataclass(slots=True)
class _Incoming:
    """One run on its way: into `directory`, which nobody knows of."""

    source: Source
    run_id: str
    listing: Listing
    directory: Path
    notes: list[str] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _left_bytes: int = MAX_RUN_BYTES

    @property
    def root(self) -> Path:
        """Its checkpoints."""
        return self.directory / rundir.CHECKPOINTS_DIR

    def receive(self, target: Path, *, overwrite: bool, num_checkpoints: int | None) -> Arrival:
        """Fetch, check, and put in place."""
        offered, manifests, state = self._offered()
        identity, epoch = offered.identity, offered.lease_epoch
        # INVARIANT: what is here already is read before it is judged, and nothing of it is touched until then.
        here = standing_of(target)
        if (verdict := self._judge(here, offered, target, overwrite)) is Verdict.KEEP:
            assert here is not None
            return Arrival(self.run_id, target, False, here.step, here.is_final, tuple(self.notes))
        step = self._checkpoints(manifests, num_checkpoints)
        self._others()
        actual = Standing(identity, epoch, state is not None, step)
        if verdict is Verdict.REPLACE and self._judge(here, actual, target, overwrite) is Verdict.KEEP:
            assert here is not None
            return Arrival(self.run_id, target, False, here.step, here.is_final, tuple(self.notes))
        if state is None:
            self._mark(epoch)
        self._put_in_place(target, is_taken=verdict is Verdict.REPLACE)
        return Arrival(self.run_id, target, True, step, state is not None, tuple(self.notes))

    def look(self, target: Path) -> Offer:
        """Fetch what is needed to judge, and judge; nothing is put in place."""
        offered, _, _ = self._offered()
        verdict = self._judge(standing_of(target), offered, target, overwrite=False)
        assert offered.identity is not None
        config = rundir.read_config(self.directory, offered.identity.config_digest)
        return Offer(self.run_id, verdict is not Verdict.KEEP, offered, self._size_bytes, config)

    def _offered(self) -> tuple[Standing, dict[str, Manifest], State | None]:
        """How far the source is, the manifests there, and the final state."""
        self._names, strange = check_names(self.run_id, self.listing.files)
        self.notes += [f"{name} is left out: no run directory has such a file" for name in strange[:10]]
        _need_room(f"run {self.run_id}", self._size_bytes, self.directory.parent)
        for directory in (self.directory, self.root, self.directory / rundir.LOGS_DIR):
            fsops.make_dir(directory)
        identity = self._identity()
        manifests = self._manifests(identity)
        epoch = max([self.listing.lease_epoch, *(manifest.lease_epoch for manifest in manifests.values())])
        state = self._state(epoch)
        newest = next((manifest.step for manifest in manifests.values()), None)
        return Standing(identity, epoch, state is not None, newest), manifests, state

    def _judge(self, here: Standing | None, offered: Standing, target: Path, overwrite: bool) -> Verdict:
        verdict, reason = decide(here, offered, overwrite=overwrite)
        if verdict is Verdict.REFUSE:
            raise ConfigError(
                f"{target} is in the way of run {self.run_id} from {self.source.name}",
                why=reason,
                do="Use another data_dir=, move the directory away, or, with resume_from_wandb, move it aside by resume.overwrite=true. It was not touched.",
            )
        if verdict is Verdict.REPLACE and (owner := rundir.read_owner(target)) is not None:
            if processes.proof_of_death(owner) is None:
                raise ConfigError(
                    f"run {self.run_id} may still have an owner here (process {owner.pid} on {owner.host})",
                    do="End that worker first; if its machine is gone for good, remove the marker file yourself.",
                )
            self.notes.append(f"what was here is moved into {ASIDE_DIR}/: {reason}")
        return verdict

    # --- the parts of a run --------------------------------------------------------------------

    def _identity(self) -> Identity:
        for name in _NEEDED:
            if name not in self._names:
                raise Damaged(f"run {self.run_id}: {self.source.name} has no {name}")
            self._take(name, limit_bytes=rundir.MAX_TEXT_BYTES)
        identity = rundir.read_identity(self.directory)
        rundir.read_config(self.directory, identity.config_digest)
        rundir.read_overrides(self.directory)
        return identity

    def _manifests(self, identity: Identity) -> dict[str, Manifest]:
        """Step directory → manifest, newest first; those that are not this run's are left out."""
        found: dict[str, Manifest] = {}
        for directory, files in _by_step(self._names).items():
            fsops.make_dir(self.root / directory)
            try:
                self._take(f"{rundir.CHECKPOINTS_DIR}/{directory}/{MANIFEST}", limit_bytes=MAX_MANIFEST_BYTES)
                manifest = read_manifest(self.root / directory)
                _check_manifest(manifest, identity, directory, files)
            except (CheckpointRefused, Damaged) as error:
                self._refuse(directory, error)
            else:
                found[directory] = manifest
        starts = {start for manifest in found.values() for start in manifest.lineage}
        for directory, manifest in list(found.items()):
            if overtaken := checkpoints.overtaken_by(manifest, starts):
                self._refuse(directory, CheckpointRefused(overtaken))
                del found[directory]
        return found

    def _checkpoints(self, manifests: Mapping[str, Manifest], num_wanted: int | None) -> int | None:
        """Fetch and check them, newest first; the step of the newest that is valid."""
        valid: list[Manifest] = []
        for directory, manifest in manifests.items():
            if num_wanted is not None and len(valid) >= num_wanted:
                fsops.remove_tree(self.root / directory)
                continue
            try:
                for name, (size, _) in manifest.files.items():
                    self._take(f"{rundir.CHECKPOINTS_DIR}/{directory}/{name}", limit_bytes=size)
                checkpoints.validate(
                    self.root / directory, run_id=self.run_id, config_digest=manifest.config_digest
                )
            except (CheckpointRefused, Damaged) as error:
                self._refuse(directory, error)
            else:
                valid.append(manifest)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        offered = _by_step(self._names)
        if valid:
            checkpoints.write_pointer(self.root, valid[0], committed_at=now)
        elif offered or _POINTER in self._names:
            # The pointer alone says that some was committed once: resume.on_invalid decides what that means.
            newest = {"run_id": self.run_id, "directory": next(iter(offered), None), "arrived_at": now}
            fsops.replace(self.root / checkpoints.POINTER, rundir.to_json(newest))
            self.notes.append(
                f"none of its {len(offered)} checkpoints is valid; resume.on_invalid decides how it goes on"
            )
        return valid[0].step if valid else None

    def _state(self, epoch: int) -> State | None:
        """The final state that its result tells of; a result that does not count is left out."""
        if rundir.RESULT_FILE not in self._names:
            return None
        why = self._try_to_take(rundir.RESULT_FILE, limit_bytes=rundir.MAX_TEXT_BYTES)
        state = None
        if not why:
            state, why = _result(self.directory, least_epoch=epoch)
        if state is None:
            self._leave_out(rundir.RESULT_FILE, why)
        return state

    def _others(self) -> None:
        if rundir.METRICS_FILE not in self._names:
            self.notes.append(f"{self.source.name} has no {rundir.METRICS_FILE}: rows are lost")
        elif why := self._try_to_take(rundir.METRICS_FILE, limit_bytes=self._left_bytes):
            self._leave_out(rundir.METRICS_FILE, f"{why}; its rows are lost")
        for name in self._names:
            if (name == _STAGES or _LOG_NAME.match(name)) and (
                why := self._try_to_take(name, limit_bytes=self._left_bytes)
            ):
                self._leave_out(name, why)
        with contextlib.suppress(FileNotFoundError):
            try:
                rundir.read_json(self.directory / _STAGES)
            except Damaged as error:
                self._leave_out(_STAGES, str(error))

    def _mark(self, epoch: int) -> None:
        """The marker of a run that nobody owns here, which says how far its fencing numbers went elsewhere."""
        marker = {
            "run_id": self.run_id,
            "attempt": self.listing.attempt,
            "lease_epoch": epoch,
            "arrived_from": self.source.name,
        }
        fsops.replace(rundir.marker_path(self.directory), rundir.to_json(marker))

    def _refuse(self, directory: str, error: SweeperError) -> None:
        self.notes.append(f"checkpoint {directory} is left out: {error}")
        fsops.remove_tree(self.root / directory)

    def _leave_out(self, name: str, why: str) -> None:
        self.notes.append(f"{name} is left out: {why}")
        fsops.remove_tree(self.directory / name)

    # --- one file ------------------------------------------------------------------------------

    @property
    def _size_bytes(self) -> int:
        return sum(self.listing.files[name].size_bytes or 0 for name in self._names)

    def _try_to_take(self, name: str, *, limit_bytes: int) -> str:
        try:
            self._take(name, limit_bytes=limit_bytes)
        except Damaged as error:
            return str(error)
        return ""

    def _take(self, name: str, *, limit_bytes: int) -> None:
        """Fetch one file, durably. Raises Damaged unless it is as listed."""
        listed, target = self.listing.files[name], self.directory / name
        limit = min(limit_bytes, self._left_bytes)
        if (listed.size_bytes or 0) > limit:
            raise Damaged(f"{name} has {listed.size_bytes} bytes, more than {limit} allowed")
        self.source.fetch(self.run_id, name, target, limit_bytes=limit)
        self._left_bytes -= _check_received(target, name, listed, limit)

    # --- the end -------------------------------------------------------------------------------

    def _put_in_place(self, target: Path, *, is_taken: bool) -> None:
        for directory in (
            *self.root.glob("step_*"),
            self.root,
            self.directory / rundir.LOGS_DIR,
            self.directory,
        ):
            fsops.fsync_dir(directory)
        if is_taken:
            aside = target.parents[1] / ASIDE_DIR
            fsops.make_dir(aside, exist_ok=True)
            fsops.rename(target, aside / f"{target.name}.{os.urandom(4).hex()}")
            fsops.fsync_dir(aside)
        fsops.rename(self.directory, target)
        fsops.fsync_dir(target.parent)


def _need_room(what: str, size_bytes: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if size_bytes > free:
        raise ConfigError(
            f"{what} has {size_bytes} bytes, and the disk has room for {free}",
            do="Free some space, or name another place with data_dir=.",
        )


def _check_manifest(manifest: Manifest, identity: Identity, directory: str, files: Sequence[str]) -> None:
    """What can be said before a byte of the checkpoint is fetched. Raises CheckpointRefused."""
    if directory != checkpoints.step_name(manifest.step):
        raise CheckpointRefused(f"{MANIFEST} is of step {manifest.step}")
    if manifest.run_id != identity.run_id:
        raise CheckpointRefused(f"it belongs to run {manifest.run_id!r}")
    if manifest.config_digest != identity.config_digest:
        raise CheckpointRefused("it was made with another config.yaml")
    if missing := sorted(set(manifest.files) - set(files)):
        raise CheckpointRefused(f"{missing[0]!r} is missing")


def _check_received(path: Path, name: str, listed: Listed, limit_bytes: int) -> int:
    """The size of a file that was just fetched, which is durable now. Raises Damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Damaged(f"{name} did not arrive", why=error.strerror or str(error)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise Damaged(f"{name} did not arrive as a regular file of its own")
        size = status.st_size
        if size > limit_bytes or listed.size_bytes not in (None, size):
            raise Damaged(
                f"{name} has {size} bytes instead of {listed.size_bytes or f'at most {limit_bytes}'}"
            )
        # A checkpoint's files are checked against its manifest, all at once.
        if listed.digest and not _STEP_FILE.match(name) and images.digest_of(fd, size) != listed.digest:
            raise Damaged(f"{name} has the wrong digest")
        os.fchmod(fd, 0o600)
        fsops.fsync_file(fd, path)
    finally:
        os.close(fd)
    return size
