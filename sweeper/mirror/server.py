"""The mirror process: copies runs of one sweep after each commit, beside the training.

Started by `sweeper.mirror.mirror` with one end of a socket. Nobody waits for it, but a worker that
ends. It may be killed at any moment: its successor reads from the copy how far it had come. It ends
with its worker, and leaves signals to it.

Worker → mirror: `begin`, `end`, `close`. Mirror → worker: `done` (a run that had ended is copied),
`left` (what a worker that ends waits for), `fenced`, `warning`, `closed`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sweeper import checkpoints, processes, rundir
from sweeper.errors import ConfigError, Fenced, SweeperError
from sweeper.mirror import generations, indexes
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copier, Overtaken, Subject
from sweeper.mirror.snapshots import Torn, result_epoch

POLL_S = 0.2
"""How often a run's pointer is looked at."""

IDLE_CHECK_S = 20.0
"""How often the generation is looked at while nothing is copied."""

SAY_AGAIN_S = 600.0
"""How often it is said that the store does not take what it should."""

MAX_TORN = 50
NICENESS = 10


@dataclass(slots=True)
class _Going:
    """A run that goes on."""

    subject: Subject
    copied: object = None
    due_s: float = 0.0
    num_torn: int = 0


class Server:
    """Serves one worker over `connection` until everything is copied after `close`, or it is fenced."""

    def __init__(self, connection: socket.socket, *, data_dir: Path, sweep: str, every_s: float) -> None:
        self._connection, self._data_dir, self._sweep, self._every_s = connection, data_dir, sweep, every_s
        self._inbox = b""
        self._copier: Copier | None = None
        self._going: dict[str, _Going] = {}
        self._over: deque[Subject] = deque()
        self._backlog: deque[Path] | None = None
        self._keep_last = 3
        self._is_closing = False
        self._num_failures, self._retry_s, self._said_s = 0, 0.0, 0.0
        self._checked_s = 0.0

    def serve(self) -> None:
        """Handle messages, and copy what is due between them."""
        wait_s = 0.0
        while True:
            for message in self._receive(wait_s):
                self._handle(message)
            try:
                did = self._turn()
            except Fenced as error:
                self._tell("fenced", text=str(error))
                return
            if self._is_closing and not self._left():
                self._tell("closed")
                return
            wait_s = 0.0 if did else POLL_S

    # --- messages --------------------------------------------------------------------------

    def _receive(self, wait_s: float) -> list[dict[str, Any]]:
        if not select.select([self._connection], [], [], wait_s)[0]:
            return []
        data = self._connection.recv(1 << 16)
        if not data:
            raise ConnectionError("the worker is gone")
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _handle(self, message: dict[str, Any]) -> None:
        if message["do"] == "close":
            self._is_closing = True
            self._backlog = None  # looked at once more: what others finished meanwhile
            self._num_failures, self._retry_s = 0, 0.0
            return
        subject = Subject(
            Path(message["run_dir"]), message["lease_epoch"], message["attempt"], message["keep_last"]
        )
        self._keep_last = subject.keep_last
        if message["do"] == "begin":
            self._going[subject.run_id] = _Going(subject)
        else:
            self._going.pop(subject.run_id, None)
            self._over.append(replace(subject, is_over=True))

    def _tell(self, event: str, **fields: Any) -> None:
        self._connection.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def _warn(self, text: str) -> None:
        self._tell("warning", text=text)

    # --- what is due -----------------------------------------------------------------------

    def _turn(self) -> bool:
        """Copy one thing that is due; whether there was one. Raises Fenced."""
        now = time.monotonic()
        if now < self._retry_s:
            return False
        try:
            did = self._copy_next(now)
        except Fenced:
            raise
        except (OSError, SweeperError) as error:
            self._failed(error)
            return False
        if did:
            self._checked_s = time.monotonic()
            self._recovered()
        return did

    def _copy_next(self, now: float) -> bool:
        copier = self._open()
        if self._over:
            self._copy_over(copier, self._over[0])
            return True
        for going in self._going.values():
            if now >= going.due_s and (key := _pointer_key(going.subject.run_dir)) != going.copied:
                self._copy_going(copier, going, key)
                return True
        if self._backlog is None:
            self._backlog = deque(self._uncopied(copier))
            if self._is_closing:
                self._tell("left", runs=self._left())
        if self._backlog:
            self._copy_backlog(copier, self._backlog[0])
            return True
        if now >= self._checked_s + IDLE_CHECK_S:
            copier.check()
            return True
        return False

    def _open(self) -> Copier:
        if self._copier is None:
            token = generations.read_token(self._data_dir, self._sweep)
            if token is None:
                raise ConfigError(
                    "this data directory holds no generation of the copy; `sweeper launch` claims one"
                )
            self._copier = Copier(Bucket.open(token.url, self._sweep), token.generation, self._warn)
        return self._copier

    def _copy_going(self, copier: Copier, going: _Going, key: object) -> None:
        with self._overtaken_is_over(going.subject):
            try:
                copier.copy(going.subject)
            except Torn:
                going.num_torn += 1
                if going.num_torn < MAX_TORN:
                    going.due_s = time.monotonic() + POLL_S
                    return
                self._warn(f"{going.subject.run_id} changes too often to be copied")
            going.copied, going.num_torn = key, 0
            going.due_s = time.monotonic() + self._every_s

    def _copy_over(self, copier: Copier, subject: Subject) -> None:
        with self._overtaken_is_over(subject):
            for _ in range(MAX_TORN):
                try:
                    copier.copy(subject)
                    break
                except Torn:
                    time.sleep(POLL_S / 10)  # the owner tidies
        self._over.popleft()
        self._tell("done", run_id=subject.run_id, lease_epoch=subject.lease_epoch)

    @contextlib.contextmanager
    def _overtaken_is_over(self, subject: Subject) -> Iterator[None]:
        try:
            yield
        except Overtaken:
            self._going.pop(subject.run_id, None)
        except rundir.Damaged as error:
            self._going.pop(subject.run_id, None)
            self._warn(f"{subject.run_id} is not copied: {error}")

    # --- what ended while nobody copied ------------------------------------------------------

    def _uncopied(self, copier: Copier) -> list[Path]:
        """Finished runs of which the copy does not say so."""
        known = indexes.final_runs(copier.bucket)
        return [
            run_dir
            for run_dir in rundir.run_dirs(self._data_dir, self._sweep)
            if run_dir.name not in known and result_epoch(run_dir) is not None
        ]

    def _copy_backlog(self, copier: Copier, run_dir: Path) -> None:
        epoch = rundir.largest_epoch(run_dir)
        subject = Subject(run_dir, epoch, _last_attempt(run_dir), self._keep_last, is_over=True)
        with _only_one(run_dir) as is_ours:
            if is_ours:
                with self._overtaken_is_over(subject), contextlib.suppress(Torn):
                    copier.copy(subject)
        assert self._backlog is not None
        self._backlog.popleft()

    def _left(self) -> list[str]:
        """What is not copied yet, by run."""
        left = [subject.run_id for subject in self._over]
        if self._backlog is None:
            return [*left, "…"]
        return [*left, *(run_dir.name for run_dir in self._backlog)]

    # --- a store that does not answer ----------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        self._num_failures += 1
        now = time.monotonic()
        wait_s = min(60.0, 0.5 * 2 ** min(self._num_failures, 10))
        self._retry_s = now + wait_s
        if self._num_failures == 1 or now - self._said_s > SAY_AGAIN_S:
            self._said_s = now
            self._warn(
                f"the copy cannot be written: {' '.join(str(error).split())[:500]}; tried again from time to time"
            )
        if self._is_closing:
            self._tell("left", runs=self._left())

    def _recovered(self) -> None:
        if self._num_failures:
            self._num_failures = 0
            self._warn("the copy can be written again")


def _pointer_key(run_dir: Path) -> object:
    """Changes with each commit. Not None, even before the first: a run is copied at once, for its identity."""
    try:
        status = os.stat(run_dir / rundir.CHECKPOINTS_DIR / checkpoints.POINTER)
    except OSError:
        return (0, 0)
    return status.st_ino, status.st_mtime_ns


def _last_attempt(run_dir: Path) -> int:
    numbers = (log.stem.rpartition("_")[2] for log in (run_dir / rundir.LOGS_DIR).glob("attempt_*.log"))
    return max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=0)


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[bool]:
    """Of several workers that find a run not copied, one copies it."""
    try:
        fd = os.open(run_dir / rundir.RUN_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # a directory that somebody has damaged must not keep the others from being copied
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def main(arguments: list[str]) -> None:
    """Serve the socket whose descriptor is the first argument, for the parent named by the second."""
    descriptor, parent_pid = int(arguments[0]), int(arguments[1])
    processes.ignore_signals()
    processes.die_with_parent(parent_pid)
    os.nice(NICENESS)
    code = 1
    try:
        connection = socket.socket(fileno=descriptor)
        Server(
            connection, data_dir=Path(arguments[2]), sweep=arguments[3], every_s=float(arguments[4])
        ).serve()
        code = 0
    except BaseException:  # noqa: BLE001 - the last to hear of it; clients of stores raise what they like
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # a client's threads may hang


if __name__ == "__main__":
    main(sys.argv[1:])
