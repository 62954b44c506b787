"""Real worker and launcher processes on a place of `crash.mini`, and an end to all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash import mini
from crash.mini import Place

from sweeper import processes

LIMIT_S = 120.0
TAG = "SWEEPER_WORKERS_TEST"


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"in {LIMIT_S:.0f} s it did not happen that {what}")


@dataclass(slots=True)
class Workers:
    """Starts commands on a place; whatever they start inherits a variable by which it is found."""

    place: Place
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a `sweeper` command; its output goes to the place's log."""
        environment = {
            **os.environ, TAG: str(self.place.data_dir), "SWEEPER_THREADS": "1",
            "PYTHONPATH": str(Path(mini.__file__).parent), "SWEEPER_DATA_DIR": str(self.place.data_dir),
        }  # fmt: skip
        with open(self.place.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeper", *arguments],
                env={**environment, **self.environment}, cwd=self.place.data_dir,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def worker(self, name: str = "a") -> subprocess.Popen[bytes]:
        """Start a worker."""
        return self.start("worker", mini.SWEEP, "--name", name)

    def finish(self, name: str = "b") -> None:
        """Let a new worker finish the sweep."""
        assert self.worker(name).wait(LIMIT_S) == 0, self.place.printed()
        assert self.alive() == []

    def alive(self) -> list[int]:
        """Everything that was started here and has not ended."""
        entry = f"{TAG}={self.place.data_dir}".encode()
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
        return [pid for pid in found if processes.start_ticks(pid) is not None]

    def all_gone(self) -> None:
        """Wait until nothing is left."""
        until(lambda: not self.alive(), "everything ended")

    def trainer(self) -> int | None:
        """The pid of the trainer at work, as the database knows it."""
        rows = self.place.rows("SELECT processes FROM sweeper_run WHERE state='running'")
        return int(json.loads(rows[0]["processes"])[0]["pid"]) if rows and rows[0]["processes"] else None

    def attempts(self) -> list[dict[str, Any]]:
        """The attempts so far, oldest first."""
        return self.place.rows("SELECT * FROM sweeper_attempt ORDER BY run_id, attempt")

    def outcomes(self) -> list[str]:
        """How the attempts ended."""
        return [row["outcome"] for row in self.attempts()]

    def end(self) -> None:
        """End with SIGKILL whatever is left."""
        while alive := self.alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.started:
                process.poll()
        for process in self.started:
            process.wait(10)
