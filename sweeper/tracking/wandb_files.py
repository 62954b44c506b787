"""Reading back what the W&B client has on disk: which steps a run's `.wandb` files already hold.

Offline, no server says where to go on after a kill, and a killed client loses what it had not
written yet; so the files are asked. Source: LevelDB's log format (blocks of 32 KiB, records of
crc32, length, type) with a header of seven bytes, as in wandb/core/internal/leveldb; the payload
is a `wandb_internal.Record`.
"""

from __future__ import annotations

import glob
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32768
_FILE_HEADER = struct.Struct("<4sHB")
_RECORD_HEADER = struct.Struct("<LHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(wandb_dir: Path, wandb_run_id: str) -> int:
    """The last step that any earlier client of this run has on disk below `wandb_dir`; -1 if none."""
    name = glob.escape(wandb_run_id)
    # A second client in the same second gets a directory with a suffix.
    files = wandb_dir.glob(f"*run-*-{name}*/run-{name}.wandb")
    return max((step for path in files for step in history_steps(path)), default=-1)


def history_steps(path: Path) -> Iterator[int]:
    """Yield the steps of the history rows in one `.wandb` file, up to its torn end, if it has one."""
    record_type: Any = import_module("wandb.proto.wandb_internal_pb2").Record  # has no types
    for payload in records(path):
        record = record_type.FromString(payload)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def records(path: Path) -> Iterator[bytes]:
    """Yield the payloads of a `.wandb` file; what is torn at its end is left out."""
    with open(path, "rb") as file:
        ident = file.read(_FILE_HEADER.size)
        if len(ident) < _FILE_HEADER.size or _FILE_HEADER.unpack(ident)[0] != b":W&B":
            return
        whole = b""
        while True:
            left = _BLOCK_BYTES - file.tell() % _BLOCK_BYTES
            if left < _RECORD_HEADER.size:
                file.seek(left, 1)
            header = file.read(_RECORD_HEADER.size)
            if len(header) < _RECORD_HEADER.size:
                return
            _, length, kind = _RECORD_HEADER.unpack(header)
            data = file.read(length)
            if len(data) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
                return
            whole = data if kind in (_FULL, _FIRST) else whole + data
            if kind in (_FULL, _LAST):
                yield whole
