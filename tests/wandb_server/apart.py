"""The server as a process of its own, for tests that kill everything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self


class Apart:
    """A context manager; the process ends with it, or with this process."""

    url: str

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wandb_server", "--port", "0", "--until-eof"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # signals to a test's group are not for it
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)

    def state(self) -> dict[str, Any]:
        """What `WandbServer.state` returns."""
        with urllib.request.urlopen(f"{self.url}/debug/state", timeout=10) as answer:
            return dict(json.load(answer))

    def wait_for(self, condition: Callable[[dict[str, Any]], Any], timeout_s: float = 20.0) -> dict[str, Any]:
        """Ask until `condition(state)` holds, and return that state. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not condition(state := self.state()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server's state stayed {state}")
            time.sleep(0.05)
        return state

    def command(self, name: str, **given: Any) -> None:
        """fault, lift, revoke, accept (as the methods of `WandbServer`), or away(seconds)."""
        request = urllib.request.Request(f"{self.url}/debug/{name}", json.dumps(given).encode())
        with urllib.request.urlopen(request, timeout=10):
            pass
