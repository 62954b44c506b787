"""A program's own checkpoint files, into a checkpoint of ours and back.

A checkpoint holds plain names only, so files in subdirectories are stored under made-up names,
and state.json says which is which.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from sweeper import checkpoints, fsops
from sweeper.checkpoints import Content, DigestingFile, Draft
from sweeper.errors import CheckpointError, CheckpointRefused

MAX_FILES = 10_000  # their names must fit into a manifest
_CHUNK_BYTES = 8 << 20


class NotTaken(CheckpointError):
    """The program's files cannot become a checkpoint as they are."""


def take(
    draft: Draft, directory: Path, *, reserved: frozenset[str], alive: Callable[[], None]
) -> dict[str, str]:
    """Copy every file below `directory` into the draft, durably.

    Args:
        reserved: Names that are ours.
        alive: Called after each file.

    Returns:
        Path below `directory` → name in the checkpoint.

    Raises:
        NotTaken: There is none, or one is no regular file or was changed meanwhile.
        OSError: The disk refused.
    """
    names = _stored_names(sorted(_paths(directory)), reserved=reserved)
    if not names:
        raise NotTaken("its directory is empty", do="Write to $SWEEPER_CHECKPOINT_DIR.")
    for path, name in names.items():
        draft.add(name, _copies(directory / path, shown=path))
        alive()
    return names


def put_back(names: Mapping[str, str], contents: Mapping[str, Content], directory: Path) -> None:
    """Write the files of a verified checkpoint where the program will look for them.

    Raises:
        CheckpointRefused: It is not one of a program.
        OSError: The disk refused.
    """
    for path, name in names.items():
        parts = PurePosixPath(path).parts
        if not parts or PurePosixPath(path).is_absolute() or ".." in parts or name not in contents:
            raise CheckpointRefused(f"{path!r} in it is no file of a program")
    for path, name in names.items():
        place = directory
        for part in PurePosixPath(path).parts[:-1]:
            place /= part
            fsops.make_dir(place, exist_ok=True)
        _put(directory / path, contents[name])


def _put(path: Path, content: Content) -> None:
    """Not durably: it is a copy, what counts is in the checkpoint."""
    fsops.write_new(path, content.data, fsync=False)
    if content.fd is not None:
        shutil.copyfile(f"/proc/self/fd/{content.fd}", path)  # the inode whose bytes were verified


def _paths(directory: Path) -> Iterator[str]:
    for root, directories, files in os.walk(directory, onerror=_raise):
        for name in [*directories, *files]:
            path = Path(root, name)
            shown = path.relative_to(directory).as_posix()
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode):
                yield shown
            elif not stat.S_ISDIR(mode):
                raise NotTaken(f"{shown} is neither a file nor a directory", do="Links cannot be kept.")


def _raise(error: OSError) -> None:
    raise error


def _stored_names(paths: list[str], *, reserved: frozenset[str]) -> dict[str, str]:
    """A name in the checkpoint for each path: its own where that will do, else a number."""
    if len(paths) > MAX_FILES:
        raise NotTaken(f"there are {len(paths)} files", do=f"Pack them: {MAX_FILES} can be kept.")
    own = {path for path in paths if checkpoints.is_file_name(path) and path not in reserved}
    numbers = (name for number in range(2 * MAX_FILES) if (name := f"file_{number:05d}") not in own)
    return {path: path if path in own else next(numbers) for path in paths}


def _copies(path: Path, *, shown: str) -> Callable[[DigestingFile], None]:
    def copy(target: DigestingFile) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as source:
            before = _mark(fd)
            while chunk := source.read(_CHUNK_BYTES):
                target.write(chunk)
            if _mark(fd) != before or target.size_bytes != before[0]:
                raise NotTaken(f"{shown} was changed while it was copied", do="Wait for the answer.")

    return copy


def _mark(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
