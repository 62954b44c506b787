"""Every durable file operation: one door, so that tests can kill or fail each of them.

An operation announces itself through `probe` before it touches the disk. A failed operation
raises OSError and leaves what was there before in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


def _no_probe(operation: str, path: Path) -> None:
    return None


probe: Callable[[str, Path], None] = _no_probe
"""Called before each operation with its name and path. Tests replace it to inject faults."""


def fsync_file(fd: int, path: Path) -> None:
    """Force the file's bytes to disk. HAZARD: after a failure never fsync the same file again:
    the kernel has dropped the error and the dirty pages (Source: fsyncgate, PostgreSQL wiki)."""
    probe("fsync", path)
    os.fsync(fd)


def fsync_dir(path: Path) -> None:
    """Make the names in directory `path` durable."""
    probe("fsync_dir", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path, *, exist_ok: bool = False) -> None:
    """Create one directory, mode 0700. Durable after `fsync_dir` of its parent."""
    probe("mkdir", path)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not exist_ok or path.is_symlink() or not path.is_dir():
            raise


def write_new(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Create `path` with `data`; FileExistsError if it is there already. Not atomic for readers."""
    probe("create", path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, data, path)
        if fsync:
            fsync_file(fd, path)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview, path: Path) -> None:
    """Write all of `data`, however often the kernel takes only a part of it."""
    probe("write", path)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` atomically and durably: readers see the old bytes or the new ones."""
    put(path, data)
    fsync_dir(path.parent)


def put(path: Path, data: bytes) -> None:
    """As `replace`, but durable only after `fsync_dir` of the parent, for several files at once."""
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def create(path: Path, data: bytes) -> None:
    """Put `data` at `path` atomically and durably, only if nothing is there (FileExistsError).

    Source: link(2) fails with EEXIST and is atomic, on NFS too.
    """
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        link(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    unlink(temporary, missing_ok=True)
    fsync_dir(path.parent)


@contextlib.contextmanager
def held(path: Path, *, busy: Exception) -> Iterator[None]:
    """Hold the file as a lock, created if it is not there; raise `busy` at once when another process does.

    The kernel gives it back when this process ends, however that is.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(fd)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses; recognised and removed by `is_temporary`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether `name` is what `temporary_name` makes: left behind by a crash, safe to remove."""
    return name.startswith(".") and name.endswith(".tmp")


def rename(source: Path, target: Path) -> None:
    """Rename; replaces a file, refuses a directory that is not empty. Durable after `fsync_dir`."""
    probe("rename", target)
    os.rename(source, target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically; FileExistsError if the name is taken."""
    probe("link", target)
    os.link(source, target)


def unlink(path: Path, *, missing_ok: bool = False) -> None:
    """Remove one file. Durable after `fsync_dir` of its parent."""
    probe("unlink", path)
    path.unlink(missing_ok=missing_ok)


def remove_tree(path: Path) -> None:
    """Remove what is at `path`, and all below it if that is a directory; never follows a link.

    Nothing there is no error: two processes may tidy the same place.
    """
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            unlink(path, missing_ok=True)
            return
        for name in os.listdir(path):
            remove_tree(path / name)
        probe("rmdir", path)
        os.rmdir(path)
    except FileNotFoundError:
        pass


def copy_prefix(source: Path, target: Path, size_bytes: int) -> None:
    """Copy the first `size_bytes` bytes of `source` into a new durable file `target`."""
    probe("create", target)
    with open(source, "rb") as reading:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            left = size_bytes
            while left > 0:
                chunk = reading.read(min(left, 1 << 20))
                if not chunk:
                    raise OSError(f"{source} has fewer than {size_bytes} bytes")
                write_all(fd, chunk, target)
                left -= len(chunk)
            fsync_file(fd, target)
        finally:
            os.close(fd)
