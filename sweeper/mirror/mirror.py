"""The worker's handle on its mirror process, which copies runs into the store.

No method raises, and none but `close` waits.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeper.companion import Companion
from sweeper.mirror.settings import MirrorSettings

SAY_S = 2.0
RESTART_S = 5.0
"""A process that died is started again, no more often than that."""


class Mirror:
    """One mirror process, or none when `mirror.url` is not set.

    A process that dies costs one warning: it is started again and told what is not copied yet.

    Args:
        settings: The config group `mirror`.
        data_dir: Which holds the generation.
        sweep: Whose runs are copied.

    Attributes:
        fenced: Who has taken over the copy, in words; "" while it is ours. Then nothing more is copied.
    """

    def __init__(self, settings: MirrorSettings, *, data_dir: Path, sweep: str) -> None:
        self._settings = settings
        self._companion = Companion(
            "sweeper.mirror.server", os.path.abspath(data_dir), sweep, repr(settings.every_s)
        )
        self._messages: dict[str, dict[str, Any]] = {}  # by run, the last one that is not settled
        self._warnings: list[str] = []
        self._left: list[str] = []
        self._not_before_s = 0.0
        self._is_closed = False
        self._keep_last = 3
        self.fenced = ""

    @property
    def pid(self) -> int | None:
        """The process, if it is there."""
        return self._companion.pid

    def start(self) -> None:
        """Start the process, if there is anything for it to do."""
        if self._settings.is_enabled and not self.fenced and self.pid is None:
            if why := self._companion.start():
                self._warnings.append(f"it cannot be started: {why}")
            self._not_before_s = time.monotonic() + RESTART_S
            for message in self._messages.values():
                self._companion.send(message)

    def begin(self, *, run_dir: Path, lease_epoch: int, attempt: int, keep_last: int) -> None:
        """An attempt begins: copy the run now, and after each commit, with so many checkpoints."""
        self._keep_last = keep_last
        self._say("begin", run_dir, lease_epoch, attempt)

    def end(self, *, run_dir: Path, lease_epoch: int, attempt: int) -> None:
        """The attempt is over, and the directory is as it shall be: copy it once more."""
        self._say("end", run_dir, lease_epoch, attempt)

    def _say(self, do: str, run_dir: Path, lease_epoch: int, attempt: int) -> None:
        if not self._settings.is_enabled or self.fenced:
            return
        message = {
            "do": do, "run_dir": os.path.abspath(run_dir), "lease_epoch": lease_epoch, "attempt": attempt,
            "keep_last": self._keep_last,
        }  # fmt: skip
        self._messages[run_dir.name] = message
        if self.pid is not None:
            self._companion.send(message)

    def poll(self) -> list[str]:
        """Move messages in both directions, restart a process that died; returns warnings."""
        events, is_gone = self._companion.exchange()
        for event in events:
            self._take(event)
        if is_gone:
            how = self._companion.drop()
            if not self.fenced and not self._is_closed:
                self._warnings.append(f"the mirror process ended ({how}) and is started again")
        if self.pid is None and not self._is_closed and time.monotonic() >= self._not_before_s:
            self.start()
        warnings, self._warnings = self._warnings, []
        return warnings

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "warning":
            self._warnings.append(str(event.get("text")))
        elif kind == "fenced":
            self.fenced = str(event.get("text"))
        elif kind == "left":
            self._left = [str(run) for run in event.get("runs", ())]
        elif kind == "closed":
            self._is_closed = True
        elif kind == "done":
            known = self._messages.get(str(event.get("run_id")), {})
            if known.get("do") == "end" and known.get("lease_epoch") == event.get("lease_epoch"):
                del self._messages[str(event.get("run_id"))]

    def close(self, say: Callable[[str], None]) -> None:
        """Wait until all that has ended is copied, for `mirror.finish_timeout` at most; then end the process.

        `say` takes warnings, among them what was not copied.
        """
        began = time.monotonic()
        deadline = began + self._settings.finish_timeout_s
        is_patient = False
        self._messages = {run: message for run, message in self._messages.items() if message["do"] == "end"}
        said = None
        while self._settings.is_enabled and not self._is_closed and not self.fenced:
            if self.pid is not None and said != self.pid:
                said = self.pid
                self._companion.send({"do": "close"})
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                say(self._what_is_left())
                break
            if not is_patient and time.monotonic() > began + SAY_S:
                is_patient = True
                say(f"copying what has ended, for {self._settings.finish_timeout_s:g} s at most")
            connection = self._companion.connection
            if connection is not None:
                writers = [connection] if self._companion.has_unsent else []
                select.select([connection], writers, [], min(left_s, 1.0))
            else:
                time.sleep(min(left_s, 0.1))
            for text in self.poll():
                say(text)
        self._is_closed = True
        self._companion.drop()

    def _what_is_left(self) -> str:
        runs = ", ".join(sorted({*self._left, *self._messages} - {"…"})) or "some runs, perhaps"
        return (
            f"NOT everything was copied within {self._settings.finish_timeout_s:g} s (mirror.finish_timeout): {runs}. "
            "It is on this machine's disk only; the next worker here copies it"
        )
