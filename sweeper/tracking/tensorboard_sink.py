"""TensorBoard event files, written without TensorFlow and without torch.

Each attempt writes a file of its own. It begins with a SessionLog START event, TensorBoard's word
for "forget what lies at this step and later", so that steps trained again are not there twice.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sweeper.tracking.messages import Begin, End
from sweeper.tracking.metrics import STEP, Row, read_rows

_LENGTH = struct.Struct("<Q")
_CRC_BYTES = 4


def event_dir(begin: Begin) -> Path:
    """Where a run's event files lie: below $TF_DIR when it is set, else in the run directory."""
    root = begin.settings.tensorboard.dir
    return Path(root) / begin.sweep / begin.run_id if root else Path(begin.run_dir) / "tensorboard"


class TensorboardSink:
    """Writes one attempt's event file.

    It goes on after the last step that both the older event files and the log have: steps the log
    no longer has will be trained again.

    Args:
        directory: Created if it is missing.
        log_path: The metrics log as the attempt begins with it.
    """

    def __init__(self, directory: Path, *, log_path: Path) -> None:
        # Heavy, and untyped in part; no business of those who only read this module's functions.
        self._event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
        writer = import_module("tensorboard.summary.writer.record_writer")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        older = sorted(directory.glob("events.out.tfevents.*"))
        logged = max((int(row[STEP]) for row in read_rows(log_path)), default=-1) if older else -1
        self.next_step = min(_last_step(older, self._event_pb2.Event), logged) + 1
        path = directory / _file_name(older)
        file = open(path, "xb")  # noqa: SIM115 - the record writer closes it
        self._writer: Any = writer.RecordWriter(file)
        self._is_dirty = True
        self._add(file_version="brain.Event:2")
        if older:
            start = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
            self._add(step=self.next_step, session_log=start)

    def observe(self, step: int, row: Row) -> None:
        """Nothing is kept of rows."""

    def write(self, step: int, row: Row) -> None:
        """One event with all numbers of the row; texts are left out."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        if numbers:
            value = self._summary_pb2.Summary.Value
            values = [value(tag=key, simple_value=number) for key, number in numbers.items()]
            self._add(step=step, summary=self._summary_pb2.Summary(value=values))

    def flush(self) -> None:
        """Hand what was written to the kernel."""
        if self._is_dirty:
            self._writer.flush()
            self._is_dirty = False

    def finish(self, end: End) -> None:
        """Close the file."""
        self._writer.close()

    def abandon(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        event = self._event_pb2.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
        self._is_dirty = True


def _file_name(older: list[Path]) -> str:
    """A name that sorts behind all older files: TensorBoard reads them in the order of their names."""
    stamps = [int(text) for path in older if (text := path.name.split(".")[3]).isdigit()]
    stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
    return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _last_step(paths: list[Path], event_type: Any) -> int:
    """The last step that a reader of these files sees, -1 if none: START events take steps back."""
    last = -1
    for path in paths:
        for data in _records(path):
            event = event_type.FromString(data)
            if event.HasField("session_log"):
                last = min(last, event.step - 1)
            elif event.HasField("summary"):
                last = max(last, event.step)
    return last


def _records(path: Path) -> Iterator[bytes]:
    """The records of an event file, up to its torn end, if it has one.

    Source: TFRecord: length (uint64), its crc (uint32), data, crc of the data (uint32).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while len(header := file.read(_LENGTH.size + _CRC_BYTES)) == _LENGTH.size + _CRC_BYTES:
            (length,) = _LENGTH.unpack_from(header)
            if file.tell() + length + _CRC_BYTES > size:
                return
            yield file.read(length)
            file.seek(_CRC_BYTES, os.SEEK_CUR)
