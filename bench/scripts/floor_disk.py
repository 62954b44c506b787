"""Floors of a save's total time and of loading it: write and fsync the same bytes; read them cold.

Usage: floor_disk.py DIRECTORY SIZE_MB REPEATS
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bench.crowd import answer

CHUNK = 8 << 20


def write_s(path: Path, data: memoryview) -> float:
    """A new file, written in pieces and fsynced."""
    path.unlink(missing_ok=True)
    started = time.monotonic()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for start in range(0, data.nbytes, CHUNK):
        os.write(fd, data[start : start + CHUNK])
    os.fsync(fd)
    os.close(fd)
    return time.monotonic() - started


def read_s(path: Path) -> float:
    """The file, from the disk, into a buffer that is reused."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(CHUNK)
    started = time.monotonic()
    while os.readv(fd, [buffer]):
        pass
    seconds = time.monotonic() - started
    os.close(fd)
    return seconds


if __name__ == "__main__":
    file, size = Path(sys.argv[1]) / "bytes", int(sys.argv[2]) * 1_000_000
    bytes_ = memoryview(os.urandom(1 << 20) * (size // (1 << 20)))
    pairs = [(write_s(file, bytes_), read_s(file)) for _ in range(int(sys.argv[3]) + 1)]
    answer({"write_s": [pair[0] for pair in pairs[1:]], "read_s": [pair[1] for pair in pairs[1:]]})
