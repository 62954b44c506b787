"""Read what measured programs wrote with `workload.mark`, while they run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Failed, last_line


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: when (monotonic seconds), in which process, what, at which step."""

    at_s: float
    pid: int
    name: str
    step: int


def read(path: Path) -> list[Event]:
    """All events so far, in order of time."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    fields = (line.split() for line in lines)
    return sorted(
        (Event(float(at), int(pid), name, int(step)) for at, pid, name, step in fields),
        key=lambda event: event.at_s,
    )


def tail(path: Path) -> Event | None:
    """The newest event, without reading the whole file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 200))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    if not lines:
        return None
    at, pid, name, step = lines[-1].split()
    return Event(float(at), int(pid), name.decode(), int(step))


def wait_for(
    path: Path,
    accept: Callable[[Event], bool],
    *,
    timeout_s: float,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> Event:
    """The first of the newest events that `accept` accepts.

    Raises:
        Failed: It did not come in time, or `process` ended before.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        newest = tail(path)
        if newest and accept(newest):
            return next(event for event in read(path) if accept(event))
        if process is not None and process.poll() is not None:
            raise Failed(f"ended early (exit code {process.returncode}): {_why(log)}")
        time.sleep(0.005)
    raise Failed(f"nothing within {timeout_s:.0f} s: {_why(log)}")


def _why(log: Path | None) -> str:
    return last_line(log.read_bytes()) if log and log.exists() else ""
