"""A process beside the worker, one socket between them, one JSON object a line in both directions.

Standard library only. Nothing here raises, and nothing waits: what the socket does not take is kept
in memory and sent at the next exchange.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Event = dict[str, Any]

DATABASE_SECRETS = frozenset(["SWEEPER_STORAGE", "PGPASSWORD"])
"""Environment variables that open the database: for workers and launchers, not for what they start."""

_ROOT = Path(__file__).resolve().parents[1]
_REAP_S = 0.5


class Companion:
    """One child process `python -m MODULE FD PARENT_PID ARGUMENT…`, or none.

    It leads a session of its own, for signals to the worker's group are not for it.

    HAZARD: for the worker's main thread only: the process dies with the thread that created it.

    Args:
        module: What runs in it.
        arguments: What its command line goes on with.
        variables: More of its environment.
        log_path: Where its own output goes; default: nowhere. What matters comes as events.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        log_path: Path | None = None,
    ) -> None:
        self._module, self._arguments = module, arguments
        self._variables, self._log_path = dict(variables or {}), log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._inbox = b""
        self._outbox = b""

    @property
    def pid(self) -> int | None:
        """The process, if it is there."""
        return self._process.pid if self._process else None

    @property
    def connection(self) -> socket.socket | None:
        """Readable when `exchange` has something to return; another one after each start."""
        return self._socket

    @property
    def has_unsent(self) -> bool:
        """Whether the socket has not taken everything yet."""
        return bool(self._outbox)

    def start(self) -> str:
        """Start the process; returns why that failed, or nothing."""
        ours, theirs = socket.socketpair()
        try:
            with open(self._log_path or os.devnull, "ab") as output:
                self._process = subprocess.Popen(
                    # -P: a module of the user's in the current directory must not shadow ours.
                    [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), str(os.getpid()), *self._arguments],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs.fileno()],
                    start_new_session=True, env={**environment(), **self._variables},
                )  # fmt: skip
        except OSError as error:
            ours.close()
            return str(error)
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket, self._inbox, self._outbox = ours, b"", b""
        return ""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message, at once or at a later exchange."""
        self.send_line(json.dumps(message).encode() + b"\n")

    def send_line(self, line: bytes) -> None:
        """As `send`, for a message that is encoded already."""
        self._outbox += line
        self._flush()

    def exchange(self) -> tuple[list[Event], bool]:
        """Move messages in both directions; returns what came, and whether the process has gone."""
        self._flush()
        events: list[Event] = []
        while self._socket is not None:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return events, False
            except OSError:
                data = b""
            if not data:
                return events, True
            *lines, self._inbox = (self._inbox + data).split(b"\n")
            for line in lines:
                try:
                    events.append(json.loads(line))
                except ValueError:
                    continue
        return events, False

    def drop(self) -> str:
        """End the process, and say how it ended."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._outbox = b""
        if process is None:
            return "gone"
        process.kill()
        try:
            code = process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "it does not die"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _flush(self) -> None:
        while self._socket is not None and self._outbox:
            try:
                sent = self._socket.send(self._outbox, socket.MSG_NOSIGNAL)
            except OSError:
                return  # full for now, or gone: then the end of the stream is seen when it is read
            self._outbox = self._outbox[sent:]


def environment() -> dict[str, str]:
    """The worker's environment without the database, where `sweeper` can be imported from a checkout."""
    result = {name: value for name, value in os.environ.items() if name not in DATABASE_SECRETS}
    if _ROOT.name not in ("site-packages", "dist-packages"):
        known = [result["PYTHONPATH"]] if result.get("PYTHONPATH") else []
        result["PYTHONPATH"] = os.pathsep.join([*known, str(_ROOT)])
    return result
