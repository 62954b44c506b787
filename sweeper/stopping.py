"""Why a worker should stop: signals, its launcher, SLURM. Nothing is done about it here."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

from sweeper import slurm
from sweeper.states import Outcome


class StopFlag:
    """Why this worker should stop. Handlers only set it; a pipe wakes whoever selects.

    Args:
        launcher_fd: Read end of a pipe the launcher holds open; its end means the launcher is gone.

    Attributes:
        warning_s: How long before the end of its time limit SLURM warns.
    """

    def __init__(self, launcher_fd: int | None = None) -> None:
        self.reason: str | None = None
        self.warning_s = 0.0
        self._cause: tuple[Outcome, str] | None = None
        self._launcher_fd = launcher_fd
        if launcher_fd is not None:
            os.set_blocking(launcher_fd, False)
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        more = (signal.SIGUSR1, signal.SIGUSR2) if slurm.is_inside() else ()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *more):
            signal.signal(signum, self._on_signal)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"the worker got {signal.Signals(signum).name}"

    @property
    def fds(self) -> tuple[int, ...]:
        """What to select on."""
        return (self._wake_r,) if self._launcher_fd is None else (self._wake_r, self._launcher_fd)

    def cause(self) -> tuple[Outcome, str]:
        """What stopping is for the attempt that is stopped. In a SLURM job, SLURM is asked why."""
        if self._cause is None:
            is_signal = self.reason is not None and self.reason.startswith("the worker got")
            ask = is_signal and slurm.is_inside()
            self._cause = (
                slurm.why_stopped(warning_s=self.warning_s) if ask else (Outcome.PREEMPTED, self.reason or "")
            )
        return self._cause

    def wait(self, seconds: float) -> None:
        """Sleep, unless there is or comes a reason to stop."""
        select.select(self.fds, [], [], seconds)

    def check(self) -> str | None:
        """The reason to stop, or None."""
        if self.reason is None and self._launcher_fd is not None:
            self.reason = _word_of_launcher(self._launcher_fd)
        return self.reason


def _word_of_launcher(fd: int) -> str | None:
    """Why the launcher wants us to stop: what it wrote, or that its end of the pipe is gone."""
    try:
        return os.read(fd, 4096).decode(errors="replace") or "the launcher is gone"
    except BlockingIOError:
        return None
