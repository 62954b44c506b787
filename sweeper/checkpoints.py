"""Checkpoints as bytes: write, commit, find, validate, prune. No torch here.

A checkpoint is a directory `step_00000123/` whose MANIFEST.json holds size and digest of every
file and of itself. It exists once it was renamed into place; it is *valid* when name, owner,
set of files, sizes, digests, run and lineage all agree. Only then are its files opened.

Protocol of a commit (DESIGN section 5): write and fsync each file in `.tmp-<epoch>-<nonce>/`,
manifest last → fsync the directory → the lease still holds → rename → fsync the parent → the
database takes it → pointer → prune.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from sweeper import fsops, images, retention, rundir
from sweeper.errors import CheckpointRefused, Fenced
from sweeper.manifests import (
    MANIFEST,
    SCHEMA_VERSION,
    Lineage,
    Manifest,
    digest,
    parse_manifest,
    read_manifest,
)
from sweeper.retention import Keep, Kept

POINTER = "trainer_checkpoint.json"
STAGES = "stage_status.json"
_DRAFT = ".tmp-"
_ASIDE = ".aside-"
CONDEMNED = ".condemned"
TRASH = ".trash"
_STEP_NAME = re.compile(r"step_([0-9]{8,12})\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
_CHUNK_BYTES = 8 << 20
_SMALL_BYTES = 64 << 10
_COLLECT_BYTES = 1 << 20


def step_name(step: int) -> str:
    """The directory name of a checkpoint: `step_00000123`."""
    return f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(directory.name.rpartition("_")[2])


def is_file_name(name: str) -> bool:
    """Whether a file of a checkpoint may be called so."""
    return _FILE_NAME.match(name) is not None


# --- writing -------------------------------------------------------------------------------


class DigestingFile:
    """A new file that hashes what is written to it; what `torch.save` gets to write to."""

    def __init__(self, path: Path) -> None:
        fsops.probe("create", path)
        self.path = path
        self.size_bytes = 0
        self.refused: OSError | None = None
        self._hasher = blake3()
        self._collected = bytearray()  # torch.save writes a hundred small pieces for each large one
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        self.size_bytes += size
        if size >= _SMALL_BYTES:
            self.flush()
            self._put(data)
        else:
            self._collected += data
            if len(self._collected) >= _COLLECT_BYTES:
                self.flush()
        return size

    def flush(self) -> None:
        """Hand what was collected to the kernel; `close_durably` is what counts."""
        collected, self._collected = self._collected, bytearray()
        if collected:
            self._put(collected)

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        try:
            fsops.write_all(self._fd, data, self.path)
        except OSError as error:
            self.refused = error
            raise
        self._hasher.update(data)

    def close(self) -> None:
        """Close what will not be used."""
        os.close(self._fd)

    def close_durably(self) -> str:
        """fsync, close, and return the digest of everything written."""
        try:
            self.flush()
            fsops.fsync_file(self._fd, self.path)
        finally:
            os.close(self._fd)
        return self._hasher.hexdigest()


@dataclass(slots=True)
class Draft:
    """A checkpoint being written: *partial* until `commit`."""

    root: Path
    run_id: str
    step: int
    lease_epoch: int
    lineage: Lineage
    parent_step: int | None
    config_digest: str
    world_size: int = 1
    value: float | None = None
    is_pinned: bool = False
    directory: Path = field(init=False)
    files: dict[str, tuple[int, str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.directory = self.root / f"{_DRAFT}{self.lease_epoch}-{secrets.token_hex(4)}"
        fsops.make_dir(self.directory)

    def add(self, name: str, write: Callable[[DigestingFile], None]) -> None:
        """Write one file through `write(file)`, durably.

        Raises:
            OSError: The disk refused. HAZARD: torch.save turns it into a RuntimeError about an
                "unexpected pos" when it comes in the middle of an archive.
        """
        file = DigestingFile(self.directory / name)
        try:
            write(file)
        except BaseException:
            file.close()
            if file.refused is not None:
                raise file.refused from None
            raise
        digest_hex = file.close_durably()
        self.files[name] = (file.size_bytes, digest_hex)

    def add_image(self, name: str, image: memoryview) -> None:
        """Write one file whose bytes lie in memory, page-aligned, as fast as the disk takes them."""
        digest_hex = images.write(self.directory / name, image)
        self.files[name] = (image.nbytes, digest_hex)

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write one small file."""
        self.add(name, lambda file: void(file.write(data)))

    def discard(self) -> None:
        """Give the space of a draft back that the disk refused; once committed, this does nothing."""
        with contextlib.suppress(OSError):
            fsops.remove_tree(self.directory)

    def seal(self) -> Manifest:
        """Write the manifest last and make the directory durable."""
        manifest = Manifest(
            run_id=self.run_id,
            step=self.step,
            lease_epoch=self.lease_epoch,
            lineage=self.lineage,
            parent_step=self.parent_step,
            config_digest=self.config_digest,
            world_size=self.world_size,
            files=dict(self.files),
            value=self.value,
            is_pinned=self.is_pinned,
        )
        data = manifest.to_bytes()
        fsops.write_new(self.directory / MANIFEST, data)
        fsops.fsync_dir(self.directory)
        return parse_manifest(data)


def void(_: object) -> None:
    """Discard a value."""


def commit(
    draft: Draft,
    *,
    check_lease: Callable[[], None],
    record: Callable[[Manifest], None],
    committed_at: str,
) -> Manifest:
    """Make a draft the run's newest checkpoint.

    Args:
        draft: With all its files added.
        check_lease: Raises Fenced when the run belongs to somebody else. Then the draft stays
            where it is: a fenced process deletes nothing.
        record: Tells the database, guarded by the lease; raises Fenced likewise.
        committed_at: UTC time for the pointer, for people.

    Raises:
        Fenced: The lease is lost.
        OSError: The disk refused; older checkpoints are untouched.
    """
    manifest = draft.seal()
    check_lease()
    target = draft.root / step_name(draft.step)
    _rename_into_place(draft, target)
    fsops.fsync_dir(draft.root)
    record(manifest)
    write_pointer(draft.root, manifest, committed_at=committed_at)
    return manifest


def _rename_into_place(draft: Draft, target: Path) -> None:
    try:
        fsops.rename(draft.directory, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    aside = draft.root / f"{_ASIDE}{draft.lease_epoch}-{secrets.token_hex(4)}"
    fsops.rename(target, aside)
    if _epoch_of(aside) > draft.lease_epoch:
        fsops.rename(aside, target)
        raise Fenced(
            f"run {draft.run_id}: step {draft.step} was already written by a newer owner",
            why=f"this attempt has lease epoch {draft.lease_epoch}",
        )
    try:
        fsops.rename(draft.directory, target)
    except OSError:
        with contextlib.suppress(OSError):
            fsops.rename(aside, target)
        raise
    _move_into(aside, draft.root / TRASH)


def _epoch_of(directory: Path) -> int:
    try:
        return read_manifest(directory).lease_epoch
    except CheckpointRefused:
        return 0


def pointer(manifest: Manifest, *, committed_at: str) -> dict[str, object]:
    """What `trainer_checkpoint.json` says of a checkpoint."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "lease_epoch": manifest.lease_epoch,
        "directory": step_name(manifest.step),
        "manifest_digest": manifest.digest,
        "committed_at": committed_at,
    }


def write_pointer(root: Path, manifest: Manifest, *, committed_at: str) -> None:
    """Point at the newest checkpoint: a hint for people and tools, repaired from a scan."""
    fsops.replace(root / POINTER, rundir.to_json(pointer(manifest, committed_at=committed_at)))


def write_stages(root: Path, *, stage: str, state: str, step: int) -> None:
    """Record where the run's stages are. A run without a pipeline has one, named `train`."""
    data = {"schema_version": 1, "stages": [{"name": stage, "state": state, "global_step": step}]}
    fsops.replace(root / STAGES, rundir.to_json(data))


# --- finding and validating ----------------------------------------------------------------


def steps_on_disk(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything named like a committed checkpoint, newest first."""
    found = []
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return []
    for entry in entries:
        match = _STEP_NAME.match(entry.name)
        if match and step_name(int(match[1])) == entry.name:
            found.append((int(match[1]), Path(entry.path)))
    return sorted(found, reverse=True)


def was_ever_committed(root: Path) -> bool:
    """Whether the disk shows that some checkpoint was committed once, whatever became of it."""
    if (root / POINTER).exists() or steps_on_disk(root):
        return True
    return any((root / name).exists() and any((root / name).iterdir()) for name in (CONDEMNED, TRASH))


@dataclass(slots=True)
class Content:
    """The verified bytes of one file.

    Attributes:
        data: All of them, unless the file is large.
        fd: A large file, open for reading: the inode whose bytes were verified. `close` it.
    """

    data: bytes = b""
    fd: int | None = None

    def close(self) -> None:
        """Close the file; what was mapped from it stays."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def validate(
    directory: Path,
    *,
    run_id: str,
    config_digest: str | None = None,
    starts: Iterable[tuple[int, int]] = (),
    keep: bool = False,
) -> tuple[Manifest, dict[str, Content]]:
    """Check every byte of a checkpoint.

    Args:
        directory: The `step_…` directory.
        run_id: The run it must belong to.
        config_digest: Digest of the run's config.yaml, when that must agree too.
        starts: (lease_epoch, step it started from) of known attempts, for the lineage.
        keep: Return the files as well: exactly the bytes that were checked.

    Returns:
        The manifest, and the content of each file (empty unless `keep`).

    Raises:
        CheckpointRefused: With the reason, naming the file.
    """
    _check_directory(directory)
    manifest = read_manifest(directory)
    if directory.name != step_name(manifest.step):
        raise CheckpointRefused(f"{MANIFEST} is of step {manifest.step}, not of {directory.name}")
    if manifest.run_id != run_id:
        raise CheckpointRefused(f"it belongs to run {manifest.run_id!r}")
    if config_digest is not None and manifest.config_digest != config_digest:
        raise CheckpointRefused("it was made with another config.yaml")
    overtaken = overtaken_by(manifest, starts)
    if overtaken:
        raise CheckpointRefused(overtaken)
    _check_names(directory, manifest)
    contents: dict[str, Content] = {}
    try:
        for name, (size, expected) in manifest.files.items():
            content = _check_file(directory / name, size, expected, keep=keep)
            if content is not None:
                contents[name] = content
    except BaseException:
        for content in contents.values():
            content.close()
        raise
    return manifest, contents


def overtaken_by(manifest: Manifest, starts: Iterable[tuple[int, int]]) -> str:
    """Why the lineage forbids this checkpoint; empty when it does not.

    A checkpoint of an older lease epoch, later than the step from which a newer epoch started,
    was written by an owner that had already lost the run.
    """
    for epoch, start in starts:
        if epoch > manifest.lease_epoch and start < manifest.step:
            return f"its owner (lease epoch {manifest.lease_epoch}) had lost the run: epoch {epoch} went on from step {start}"
    return ""


def _check_directory(directory: Path) -> None:
    try:
        status = os.lstat(directory)
        owner = os.lstat(directory.parent).st_uid
    except OSError as error:
        raise CheckpointRefused("it cannot be read", why=error.strerror or str(error)) from error
    if not stat.S_ISDIR(status.st_mode):
        raise CheckpointRefused("it is not a directory")
    if status.st_uid != owner:
        raise CheckpointRefused("it belongs to another user than the run")


def _check_names(directory: Path, manifest: Manifest) -> None:
    bad = [name for name in manifest.files if not _FILE_NAME.match(name) or name == MANIFEST]
    if bad:
        raise CheckpointRefused(f"{MANIFEST} names the file {bad[0]!r}")
    try:
        present = set(os.listdir(directory))
    except OSError as error:
        raise CheckpointRefused("it cannot be read", why=error.strerror or str(error)) from error
    expected = {MANIFEST, *manifest.files}
    if missing := sorted(expected - present):
        raise CheckpointRefused(f"{missing[0]} is missing")
    if extra := sorted(present - expected):
        raise CheckpointRefused(f"{extra[0]!r} does not belong to it")


def _check_file(path: Path, size: int, expected: str, *, keep: bool) -> Content | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointRefused(f"{path.name} cannot be read", why=error.strerror or str(error)) from error
    content = Content(fd=fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointRefused(f"{path.name} is not a regular file")
        if status.st_size != size:
            raise CheckpointRefused(
                f"{path.name} has {status.st_size} bytes instead of {size}", why="a torn write?"
            )
        is_large = size >= images.MAPPED_FROM_BYTES
        data = b"" if is_large else _read_all(fd, size)
        found = images.digest_of(fd, size) if is_large else digest(data)
        if found != expected:
            raise CheckpointRefused(
                f"{path.name} has the wrong digest", why="damaged on disk or a torn write"
            )
        if keep and is_large:
            content, kept_content = Content(), content
            return kept_content
        return Content(data) if keep else None
    except OSError as error:
        raise CheckpointRefused(f"{path.name} cannot be read", why=error.strerror or str(error)) from error
    finally:
        content.close()


def _read_all(fd: int, size: int) -> bytes:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size and (count := file.readinto(view[done:])):
            done += count
    return bytes(data[:done])


def known_starts(root: Path) -> set[tuple[int, int]]:
    """(lease_epoch, start step) of every attempt that the readable manifests on disk tell of."""
    starts: set[tuple[int, int]] = set()
    for _, directory in steps_on_disk(root):
        try:
            starts.update(read_manifest(directory).lineage)
        except CheckpointRefused:
            continue
    return starts


@dataclass(frozen=True, slots=True)
class Inspected:
    """One checkpoint on disk. `reason` is None when it is valid."""

    step: int
    directory: Path
    lease_epoch: int | None
    size_bytes: int
    reason: str | None


def inspect(
    root: Path, *, run_id: str, config_digest: str | None = None, starts: Iterable[tuple[int, int]] = ()
) -> list[Inspected]:
    """Validate every checkpoint below `root`, newest first. Reads all bytes, changes nothing."""
    all_starts = known_starts(root) | set(starts)
    result = []
    for step, directory in steps_on_disk(root):
        reason = epoch = None
        size = 0
        try:
            manifest, _ = validate(directory, run_id=run_id, config_digest=config_digest, starts=all_starts)
            epoch, size = manifest.lease_epoch, sum(size for size, _ in manifest.files.values())
        except CheckpointRefused as error:
            reason = str(error)
        result.append(Inspected(step, directory, epoch, size, reason))
    return result


def newest_valid(root: Path, *, run_id: str, starts: Iterable[tuple[int, int]] = ()) -> int | None:
    """Step of the newest valid checkpoint, or None. Reads no more than it must."""
    all_starts = known_starts(root) | set(starts)
    for step, directory in steps_on_disk(root):
        try:
            validate(directory, run_id=run_id, starts=all_starts)
        except CheckpointRefused:
            continue
        return step
    return None


def run_id_inside(root: Path) -> str:
    """The run that the newest readable checkpoint says it is of, for directories are renamed and copied."""
    for _, directory in steps_on_disk(root):
        try:
            return read_manifest(directory).run_id
        except CheckpointRefused:
            continue
    return root.absolute().parent.name


def find_latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint whose every byte is good; None if there is none. Needs neither torch nor a database.

    Args:
        directory: A run directory, or the `checkpoints` directory in it.
    """
    root = Path(directory)
    if not steps_on_disk(root):
        root = root / rundir.CHECKPOINTS_DIR
    try:
        run_id = rundir.read_identity(root.absolute().parent).run_id
    except (FileNotFoundError, rundir.Damaged):
        run_id = run_id_inside(root)
    step = newest_valid(root, run_id=run_id)
    return None if step is None else root / step_name(step)


# --- tidying, by the owner only ------------------------------------------------------------


def condemn(root: Path, directories: Iterable[Path]) -> None:
    """Move refused and newer checkpoints out of the way, so that they cannot shadow new ones."""
    moved = False
    for directory in directories:
        _move_into(directory, root / CONDEMNED)
        moved = True
    if moved:
        fsops.fsync_dir(root)


def _move_into(directory: Path, place: Path) -> None:
    fsops.make_dir(place, exist_ok=True)
    fsops.rename(directory, place / f"{directory.name.lstrip('.')}-{secrets.token_hex(4)}")


def prune(
    root: Path,
    *,
    run_id: str,
    rules: Keep,
    known_good: dict[int, Kept],
    starts: Iterable[tuple[int, int]] = (),
) -> list[int]:
    """Trash the checkpoints that no rule keeps.

    Only valid checkpoints of the current lineage count; each is verified once and remembered
    in `known_good`. Everything newer than the checkpoint this attempt resumed from is its own
    (`condemn` saw to that), so that one stays until `keep_last` newer ones are durable.

    Returns:
        The steps that were removed.
    """
    there = steps_on_disk(root)
    if len(there) <= rules.last:
        return []
    good: list[Kept] = []
    for step, directory in there:
        # What the newest few are worth is proven byte by byte; of the others the manifest will do.
        is_needed = len(good) < max(2, rules.last)
        if step not in known_good and (found := _look(directory, run_id, starts, whole=is_needed)):
            known_good[step] = found
        if step in known_good:
            good.append(known_good[step])
    doomed = retention.doomed([step for step, _ in there], good, rules)
    for step, directory in there:
        if step in doomed:
            _move_into(directory, root / TRASH)
            known_good.pop(step, None)
    empty_trash(root)
    return sorted(doomed, reverse=True)


def _look(directory: Path, run_id: str, starts: Iterable[tuple[int, int]], *, whole: bool) -> Kept | None:
    try:
        if whole:
            manifest, _ = validate(directory, run_id=run_id, starts=starts)
        else:
            manifest = read_manifest(directory)
    except CheckpointRefused:
        return None
    return kept(manifest)


def kept(manifest: Manifest) -> Kept:
    """What the rules of keeping look at."""
    return Kept(manifest.step, manifest.value, manifest.is_pinned)


def empty_trash(root: Path) -> None:
    """Unlink what was renamed into the trash."""
    trash = root / TRASH
    if trash.is_dir() and not trash.is_symlink():
        for name in os.listdir(trash):
            fsops.remove_tree(trash / name)


def clean(root: Path, *, lease_epoch: int) -> None:
    """Remove partial checkpoints and trash of attempts before `lease_epoch`.

    A checkpoint that one of them had moved aside, and was killed, gets its name back: it may be
    a newer owner's. A rename that one of them has still in mind fails, for its source is gone.
    """
    for path in _entries(root):
        if fsops.is_temporary(path.name):
            fsops.remove_tree(path)
        elif path.name.startswith((_DRAFT, _ASIDE)) and _epoch_in(path.name) < lease_epoch:
            is_back = path.name.startswith(_ASIDE) and _put_back(root, path)
            if not is_back:
                fsops.remove_tree(path)
    if (root / TRASH).is_dir():
        empty_trash(root)
        fsops.remove_tree(root / TRASH)


def _entries(root: Path) -> list[Path]:
    try:
        return [root / name for name in os.listdir(root)]
    except FileNotFoundError:
        return []


def _put_back(root: Path, aside: Path) -> bool:
    """Give a checkpoint that was moved aside its name back, unless it is taken or lost."""
    try:
        target = root / step_name(read_manifest(aside).step)
    except CheckpointRefused:
        return False
    if target.exists() or target.is_symlink():
        return False
    fsops.rename(aside, target)
    fsops.fsync_dir(root)
    return True


def _epoch_in(name: str) -> int:
    number = name.split("-")[1]
    return int(number) if number.isdigit() and len(number) < 12 else 0
