"""Files whose bytes lie in memory: written durably and hashed at the speed of the disk."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from sweeper import fsops

PAGE_BYTES = 4096
MAPPED_FROM_BYTES = 1 << 20
"""Files from here on are verified in pieces and then mapped, instead of being held in memory."""
_CHUNK_BYTES = 8 << 20
_READ_BYTES = 1 << 20  # stays in the processor's cache between reading and hashing
_DIRECT_FROM_BYTES = 1 << 20
_WRITERS = 2
_REFUSES_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}


def write(path: Path, image: memoryview) -> str:
    """Create `path` with the bytes of `image`, durably; returns their BLAKE3 digest.

    Large images bypass the page cache, whose fresh pages would cost seconds of CPU, and are hashed
    in a thread beside the writing (both release the GIL).

    Args:
        path: A new file; its directory must be made durable by the caller.
        image: Starts on a page, and can be read up to the end of its last page.

    Raises:
        OSError: The disk refused. Never try the same file again: begin another.
    """
    fsops.probe("create", path)
    is_large = image.nbytes >= _DIRECT_FROM_BYTES
    fd = _open(path, direct=is_large)
    try:
        fsops.probe("write", path)
        digest = _write_beside_hashing(fd, image) if is_large else _write_small(fd, image)
        fsops.fsync_file(fd, path)
    finally:
        os.close(fd)
    return digest


def _open(path: Path, *, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno not in _REFUSES_DIRECT:
                raise
            path.unlink(missing_ok=True)  # tmpfs and some network file systems
    return os.open(path, flags, 0o600)


def _write_small(fd: int, image: memoryview) -> str:
    done = 0
    while done < image.nbytes:
        done += os.write(fd, image[done:])
    return blake3(image).hexdigest()


def _write_beside_hashing(fd: int, image: memoryview) -> str:
    with ThreadPoolExecutor(max_workers=1 + _WRITERS) as pool:  # left when all have ended
        hashing = pool.submit(_hash, image)
        writing = [pool.submit(_write_part, fd, image, number) for number in range(_WRITERS)]
    for part in writing:
        part.result()
    return hashing.result()


def _hash(image: memoryview) -> str:
    hasher = blake3()
    for start in range(0, image.nbytes, _CHUNK_BYTES):
        hasher.update(image[start : start + _CHUNK_BYTES])
    return hasher.hexdigest()


def _write_part(fd: int, image: memoryview, number: int) -> None:
    """Every `_WRITERS`-th chunk. The last, which may end inside a page, is written through the cache."""
    for start in range(number * _CHUNK_BYTES, image.nbytes, _WRITERS * _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, image.nbytes)
        done = _pwrite_whole_pages(fd, image, start, end)
        if done < end:
            buffered = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
            try:
                _pwrite(buffered, image, done, end)
            finally:
                os.close(buffered)


def _pwrite_whole_pages(fd: int, image: memoryview, start: int, end: int) -> int:
    """Write past the cache; returns how far that went: some file systems take O_DIRECT, but no such write."""
    whole = end // PAGE_BYTES * PAGE_BYTES
    while start < whole:
        try:
            start += os.pwrite(fd, image[start:whole], start)
        except OSError as error:
            if error.errno not in _REFUSES_DIRECT:
                raise
            return start
    return start


def _pwrite(fd: int, image: memoryview, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(fd, image[start:end], start)


def digest_of(fd: int, size: int) -> str:
    """BLAKE3 of the first `size` bytes of a file. The kernel reads ahead meanwhile."""
    hasher = blake3()
    buffer = memoryview(bytearray(_READ_BYTES))
    done = 0
    while done < size and (count := os.preadv(fd, [buffer[: size - done]], done)):
        hasher.update(buffer[:count])
        done += count
    return hasher.hexdigest()
