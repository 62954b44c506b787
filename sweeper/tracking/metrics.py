"""The metrics log: every row a training reports, one JSON object a line, written first of all.

W&B and TensorBoard are fed from this file by another process (`sweeper.tracking.server`), and a
resume cuts it back to the offset its checkpoint recorded. Standard library only: the trainer
imports this.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from sweeper import fsops

Value = str | int | float | bool
Row = dict[str, Value]

STEP = "step"
MAX_ROW_BYTES = 1 << 20
MAX_STEP = 10**12
_CHUNK_BYTES = 1 << 18
_MAX_DAMAGED_LINES = 100

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """The trainer's end of `metrics.jsonl`: append rows, make them durable, keep the file in place.

    Opening cuts the log to `offset` bytes by copying the prefix to a new file and renaming it over
    the old one: always a new inode, so that a zombie that has the old file open writes to a file
    nobody reads.

    Args:
        path: The log, `<run_dir>/metrics.jsonl`; it need not exist.
        offset: Bytes to keep, as recorded in the checkpoint; 0 starts an empty log.
        check_lease: Called each time a new file is about to take the path, when it is durable
            under a temporary name; raises Fenced. A new owner removes temporary files, so an
            owner that was stopped just after this check finds nothing left to rename.

    Attributes:
        path: As given.
        warning: What was wrong with the file found (shorter than `offset`, cut inside a row,
            not a regular file), in words for people; "" if nothing. Whole rows are kept.

    Raises:
        OSError: The disk refused; the file that was there is still there.
    """

    def __init__(
        self, path: Path, *, offset: int = 0, check_lease: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self._check_lease = check_lease
        self.warning = ""
        self._is_suspect = False
        found = _open_regular(path)
        try:
            keep_bytes = self._whole_rows(found, offset)
            self._fd = self._put(found, keep_bytes)
        finally:
            if found is not None:
                os.close(found)
        self._size_bytes = self._durable_bytes = keep_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """Bytes written so far; durable only after `sync`."""
        return self._size_bytes

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append one row with a single write(2). All of it is in the file, or nothing.

        Args:
            step: The global step; rows of equal steps are merged by those who read.
            row: Numbers and texts; anything with `.item()` (NumPy and torch scalars) is taken too.

        Raises:
            TypeError: A value is neither a number nor a text.
            ValueError: The row has a key "step", or is larger than `MAX_ROW_BYTES`.
            OSError: The disk refused; the log is as it was before.
        """
        data = encode_row(step, row)
        try:
            fsops.write_all(self._fd, data, self.path)
        except OSError:
            # A torn row must not be continued by the next one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size_bytes)
            raise
        self._size_bytes += len(data)

    @property
    def fd(self) -> int:
        """The open file, for whoever makes it durable before a commit; it may change."""
        return self._fd

    def distrust(self) -> None:
        """Somebody's fsync of this file may have failed: its rows are put into a new file when next used."""
        self._is_suspect = True

    def settle(self) -> int:
        """Have the rows in a sound file at the path, and return its length in bytes, not yet durable.

        Raises: As `ensure_in_place`.
        """
        if self._is_suspect:
            self._put_back()
        else:
            self.ensure_in_place()
        return self._size_bytes

    def sync(self) -> int:
        """Make all rows durable and return the log's length in bytes, for the checkpoint.

        Raises:
            OSError: The rows may not be on disk; the next `sync` writes them to a new file.
        """
        if self._is_suspect:
            self._put_back()
        elif self._durable_bytes != self._size_bytes:
            try:
                fsops.fsync_file(self._fd, self.path)
            except OSError:
                self._is_suspect = True  # the same file must never be fsynced again
                raise
            self._durable_bytes = self._size_bytes
        return self._size_bytes

    def ensure_in_place(self) -> bool:
        """Put this log's own content back if the file at the path is another one.

        Returns:
            True if something else was at the path.

        Raises:
            Fenced: It is a newer owner's; nothing was changed.
            OSError: The disk refused.
        """
        mine = os.fstat(self._fd)
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return False
        self._put_back()
        return True

    def close(self) -> None:
        """Close the file. Rows stay; without `sync` they are not durable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _whole_rows(self, found: int | None, offset: int) -> int:
        """How many bytes to keep: `offset`, or up to the last whole row before it."""
        if found is None:
            if offset:
                self.warning = f"{self.path} is missing; {offset} bytes of rows are lost"
            return 0
        size = os.fstat(found).st_size
        keep = _end_of_row(found, min(size, offset))
        if keep < offset:
            why = f"has {size} bytes" if size < offset else "is cut inside a row there"
            self.warning = f"{self.path} should have {offset} bytes but {why}; kept its rows up to {keep}"
        return keep

    def _put(self, source: int | None, size_bytes: int) -> int:
        """Copy a prefix of the open file `source` to a new file at the path; return its descriptor."""
        temporary = fsops.temporary_name(self.path)
        try:
            if source is None:
                fsops.write_new(temporary, b"")
            else:
                fsops.copy_prefix(Path(f"/proc/self/fd/{source}"), temporary, size_bytes)
            fd = os.open(temporary, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                self._check_lease()
                fsops.rename(temporary, self.path)
                fsops.fsync_dir(self.path.parent)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return fd

    def _put_back(self) -> None:
        old = self._fd
        self._fd = self._put(old, self._size_bytes)
        self._durable_bytes = self._size_bytes
        self._is_suspect = False
        os.close(old)


def _open_regular(path: Path) -> int | None:
    """A descriptor for reading, or None when no regular file is there; links are not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _end_of_row(fd: int, limit: int) -> int:
    """The largest offset up to `limit` that ends a row (follows a newline), 0 if there is none."""
    while limit > 0:
        start = max(0, limit - _CHUNK_BYTES)
        newline = os.pread(fd, limit - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        limit = start
    return 0


# --- rows ----------------------------------------------------------------------------------


def encode_row(step: int, row: Mapping[str, Any]) -> bytes:
    """One line of the log: strict JSON; NaN and infinities are written as texts."""
    if STEP in row:
        raise ValueError(f"a row cannot have a key {STEP!r}: it is the global step")
    values = {key: _encode_value(key, value) for key, value in row.items()}
    data = json.dumps({STEP: int(step), **values}, allow_nan=False).encode() + b"\n"
    if len(data) > MAX_ROW_BYTES:
        raise ValueError(f"the row of step {step} has {len(data)} bytes, more than {MAX_ROW_BYTES}")
    return data


def _encode_value(key: str, value: Any) -> Value:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str | int):
        return value
    if hasattr(value, "item"):
        plain = value.item()
        if isinstance(plain, str | int | float):
            return _encode_value(key, plain)
    raise TypeError(f"{key!r} is a {type(value).__name__}; a row takes numbers and texts")


def decode_row(line: bytes) -> Row | None:
    """What `encode_row` wrote, or None when the line is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get(STEP)) is not int:
        return None
    decoded = {key: _NON_FINITE.get(v, v) if isinstance(v, str) else v for key, v in row.items()}
    return {key: value for key, value in decoded.items() if isinstance(value, str | int | float)}


# --- reading -------------------------------------------------------------------------------


def read_rows(path: Path, start: int = 0) -> Iterator[Row]:
    """Yield the complete rows from byte `start` on; a torn last line and damaged lines are left out.

    A log that is missing, or not a regular file, has no rows.
    """
    fd = _open_regular(path)
    if fd is None:
        return
    try:
        os.lseek(fd, start, os.SEEK_SET)
        yield from _Lines(fd).rows()
    finally:
        os.close(fd)


def last_step(path: Path) -> int | None:
    """The step of the last row, read from the end; None when there is none among the last lines."""
    fd = _open_regular(path)
    if fd is None:
        return None
    try:
        end = _end_of_row(fd, os.fstat(fd).st_size)
        for _ in range(_MAX_DAMAGED_LINES):
            start = _end_of_row(fd, end - 1)
            row = decode_row(os.pread(fd, end - start, start)) if end - start <= MAX_ROW_BYTES else None
            if row is not None and isinstance(step := row[STEP], int) and 0 <= step < MAX_STEP:
                return step
            end = start
    except OSError:  # no reason to give up a training for
        return None
    finally:
        os.close(fd)
    return None


class _Lines:
    """Complete rows of an open file, as far as it has been written; may be asked again."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._is_skipping = False  # inside a line that is too long to be a row

    def rows(self) -> Iterator[Row]:
        while chunk := os.read(self._fd, _CHUNK_BYTES):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                is_skipped, self._is_skipping = self._is_skipping, False
                row = None if is_skipped else decode_row(line)
                if row is not None:
                    yield row
            if len(self._rest) > MAX_ROW_BYTES:
                self._rest, self._is_skipping = b"", True


class Follower:
    """Reads a metrics log while it grows, through replacements of the file, each row once.

    A replaced file (a resume cut the log) is read from its beginning; rows up to the last one
    already given are skipped. Rows of one log never go back in steps.

    Args:
        path: The log; it need not exist yet.
        may_follow: Asked when the file was replaced; False ends the following for good, because
            the new file is another owner's.
    """

    def __init__(self, path: Path, *, may_follow: Callable[[], bool] = lambda: True) -> None:
        self.path = path
        self.is_over = False
        self._may_follow = may_follow
        self._fd: int | None = None
        self._lines: _Lines | None = None
        self._given = self._at = (-1, 0)  # (step, how many rows of this step)

    def rows(self) -> Iterator[Row]:
        """Yield the rows that came since the last call; never waits."""
        while not self.is_over:
            if self._lines is not None:
                yield from self._fresh(self._lines)
            if not self._reopen():
                return

    def close(self) -> None:
        """Close the file; nothing more is given."""
        self.is_over = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._lines = None

    def _fresh(self, lines: _Lines) -> Iterator[Row]:
        for row in lines.rows():
            step = int(row[STEP])
            self._at = (step, self._at[1] + 1 if step == self._at[0] else 1)
            if self._at > self._given:
                self._given = self._at
                yield row

    def _reopen(self) -> bool:
        """Open the file at the path if it is not the one that is open. False: nothing new."""
        if self._is_in_place():
            return False
        fd = _open_regular(self.path)
        if fd is None:
            return False
        if self._fd is not None:
            if not self._may_follow():
                os.close(fd)
                self.close()
                return False
            os.close(self._fd)
        self._fd, self._lines, self._at = fd, _Lines(fd), (-1, 0)
        return True

    def _is_in_place(self) -> bool:
        if self._fd is None:
            return False
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
