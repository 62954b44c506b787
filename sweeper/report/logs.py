"""`sweeper logs`: what every attempt printed, byte for byte."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sweeper import rundir
from sweeper.errors import NotFound, StorageError
from sweeper.reading import Reading
from sweeper.report import places, tables
from sweeper.states import State

_POLL_S = 0.25
_CHUNK_BYTES = 1 << 20


def main(
    run_id: str, *, storage: str, data_dir: Path, follow: bool, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Print all attempts' logs in order; with `follow`, go on until the run is final.

    Raises:
        NotFound: There is no such run, neither in the database nor on disk.
    """
    run_dir = _run_dir(run_id, storage=storage, data_dir=data_dir)
    tail = _Tail(run_dir, out=sys.stdout.buffer)
    tail.copy_new()
    while follow:
        # INVARIANT: look whether it is final before the last copy, so that nothing printed
        # before that is missed.
        is_over = _is_final(run_id, storage=storage, run_dir=run_dir)
        tail.copy_new()
        if is_over:
            break
        sleep(_POLL_S)
    if not tail.has_copied:
        print(f"sweeper: run {run_id} has printed nothing yet", file=sys.stderr)
    return 0


def _run_dir(run_id: str, *, storage: str, data_dir: Path) -> Path:
    try:
        with Reading(storage) as reading:
            return data_dir / reading.run(run_id)["path"]
    except (NotFound, StorageError):
        # The database may be lost or damaged; what was printed is on disk all the same.
        found = _on_disk(run_id, data_dir=data_dir)
        if found is None:
            raise
        return found


def _on_disk(run_id: str, *, data_dir: Path) -> Path | None:
    try:
        return places.find_run_dir(run_id, data_dir=data_dir)
    except NotFound:
        return None


def _is_final(run_id: str, *, storage: str, run_dir: Path) -> bool:
    if (run_dir / rundir.RESULT_FILE).exists() and not rundir.marker_path(run_dir).exists():
        return True
    try:
        with Reading(storage) as reading:
            return State(reading.run(run_id)["state"]).is_final
    except (NotFound, StorageError):
        return False


class _Tail:
    """Copies what was added to the logs of a run since the last time."""

    def __init__(self, run_dir: Path, *, out: BinaryIO) -> None:
        self._run_dir = run_dir
        self._out = out
        self._done_bytes: dict[int, int] = {}

    @property
    def has_copied(self) -> bool:
        return bool(self._done_bytes)

    def copy_new(self) -> None:
        """Copy everything new, of older attempts first."""
        for attempt, path in places.log_files(self._run_dir):
            if attempt not in self._done_bytes:
                self._done_bytes[attempt] = 0
                header = f"==> {self._run_dir.name} attempt {attempt} <=="
                print(tables.escape(header), file=sys.stderr, flush=True)
            self._copy(attempt, path)
        self._out.flush()

    def _copy(self, attempt: int, path: Path) -> None:
        fd = places.open_log(path)
        try:
            while data := os.pread(fd, _CHUNK_BYTES, self._done_bytes[attempt]):
                self._out.write(data)
                self._done_bytes[attempt] += len(data)
        finally:
            os.close(fd)
