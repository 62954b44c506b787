"""Ending W&B service processes that outlived the tracker which started them.

wandb-core runs in a session of its own and goes on sending rows for a while after its client was
killed. Two of them on one run would write steps twice, so each inherits two variables by which
it can be found: the tracker's, for its worker, and the W&B run's id, for the run's next owner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from sweeper import processes

TRACKER_VARIABLE = "SWEEPER_TRACKER"
RUN_VARIABLE = "SWEEPER_WANDB_RUN"


def end(variable: str, value: str, *, wait_s: float = 0.0) -> list[int]:
    """SIGKILL every other process that inherited `variable=value`; wait until they are gone.

    Returns:
        The pids that were ended.
    """
    entry = f"{variable}={value}".encode()
    found = [pid for pid in _other_pids() if entry in _environment(pid).split(b"\0")]
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and any(processes.start_ticks(pid) is not None for pid in found):
        time.sleep(0.002)  # not our children: nothing to wait on
    return found


def _other_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
