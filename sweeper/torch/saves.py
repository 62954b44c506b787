"""How a loop's checkpoints are saved: at once, or beside the training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from sweeper.torch.memory import Memory, NoRoom
from sweeper.trainer.commits import Plan
from sweeper.trainer.run import Run
from sweeper.trainer.saver import Done, Saver

BESIDE_FROM_BYTES = 4 << 20
BESIDE_FROM_S = 0.05
"""A saver process costs 0.1 s once: what is saved faster than that is saved at once."""
COMPLAIN_AFTER_S = 60.0
HANGS_AFTER_S = 120.0
HANGS_AFTER_STOP_S = 10.0
"""A saver that takes so long hangs: always, and when this attempt is asked to stop."""
SLOW_BYTES_S = 10e6
SLOW_AFTER_STOP_BYTES_S = 100e6
"""… but its disk may be as slow as that."""
SLICE_S = 0.5


class Saves:
    """Saves of one attempt, at most one of them in flight.

    Attributes:
        blocked_s: How long the last save kept the loop waiting.
        took_s: How long the last save took in all.

    Args:
        run: Whose checkpoints.
        is_beside: Whether a saver process may be used (`checkpoint.async_save`).
    """

    def __init__(self, run: Run, *, is_beside: bool) -> None:
        self._run, self._is_beside = run, is_beside
        self._memory = Memory()
        self._saver: Saver | None = None
        self._done: Done | None = None
        self._wanted_bytes = 0
        self._complain_at_s = math.inf
        self._begun_at_s = 0.0
        self._in_flight: tuple[Plan, dict[str, tuple[int, int]]] | None = None
        self.blocked_s = self.took_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a save, or its preparation, is in flight."""
        return self._saver is not None and self._saver.is_busy

    def begin(self, plan: Plan, files: Mapping[str, Any], *, wait: bool, is_asked: bool = False) -> bool:
        """Take a snapshot of `files` and save it; `poll` or `wait` tells what became of it.

        Args:
            files: Name → bytes or a state for `torch.save`; may change as soon as this returns.
            wait: There will be no later: it is the last save of an attempt.
            is_asked: This very step is meant: room is made at once.

        Returns:
            False when nothing was begun: room is being made, try again at the next step.

        Raises:
            SaverLost: The saver was killed.
        """
        started = time.monotonic()
        places = self._pack(files, wait=wait or is_asked)
        if places is None:
            return False
        size = sum(size for _, size in places.values())
        is_slow = size >= BESIDE_FROM_BYTES or self.took_s >= BESIDE_FROM_S
        if self._saver is None and (wait or not self._is_beside or not is_slow):
            self._done = self._save_here(plan, places, started)
        else:
            self._in_flight, self._begun_at_s = (plan, places), started
            memory_bytes, metrics_fd = self._memory.size_bytes, self._run.metrics.fd
            self._start().save(plan, places, size_bytes=memory_bytes, metrics_fd=metrics_fd)
            self._complain_at_s = time.monotonic() + max(COMPLAIN_AFTER_S, 10 * self.took_s)
        self.blocked_s = time.monotonic() - started
        return True

    def poll(self) -> Done | None:
        """What became of the save in flight, if that is known. Raises SaverLost."""
        return self._take(wait_s=0.0)

    def wait(self) -> Done | None:
        """Wait for the save in flight, if there is one.

        Raises:
            SaverLost: The saver was killed.
            Fenced: The lease may be over.
        """
        while self.is_busy:
            if done := self._take(wait_s=SLICE_S):
                return done
            self._run.poll()
        return self._take(wait_s=0.0)

    def _take(self, *, wait_s: float) -> Done | None:
        done, self._done = self._done, None
        if done is None and self._saver is not None:
            done = self._saver.poll(wait_s=wait_s)
            self._complain_once(done)
            if done is None and self.is_busy and self._hangs():
                done = self._do_its_work()
        if done is not None and done.kind == "allocate":
            if done.error is None:
                self._memory.grow(self._wanted_bytes)
            return None  # the memory is there now, or its pages are made as they are used
        if done is not None:
            self.took_s = done.seconds
        return done

    def _complain_once(self, done: Done | None) -> None:
        """A saver that hangs would be noticed by nobody: training goes on."""
        if done is not None or not self.is_busy or time.monotonic() < self._complain_at_s:
            return
        self._complain_at_s = math.inf
        self._run.complain(
            f"a save has been under way for {COMPLAIN_AFTER_S:.0f} s; training goes on, but nothing newer is saved until it ends"
        )

    def _hangs(self) -> bool:
        size = self._memory.size_bytes
        if self._run.stop_reason is None:
            limit_s = HANGS_AFTER_S + 10 * self.took_s + size / SLOW_BYTES_S
        else:
            limit_s = HANGS_AFTER_STOP_S + 2 * self.took_s + size / SLOW_AFTER_STOP_BYTES_S
        return time.monotonic() - self._begun_at_s > limit_s

    def _do_its_work(self) -> Done:
        """End a saver that hangs, and save here what it should have; the snapshot is still there."""
        assert self._saver is not None
        self._saver.close()
        self._saver, self._is_beside = None, False
        waited_s = time.monotonic() - self._begun_at_s
        self._run.complain(
            f"the saver hung for {waited_s:.0f} s and was ended; from now on a save keeps the training waiting"
        )
        if self._in_flight is None:
            return Done("allocate", waited_s, error=TimeoutError())
        plan, places = self._in_flight
        return self._save_here(plan, places, time.monotonic())

    def close(self) -> None:
        """End the saver."""
        if self._saver is not None:
            self._saver.close()

    def _pack(self, files: Mapping[str, Any], *, wait: bool) -> dict[str, tuple[int, int]] | None:
        """Places in the memory; None while the saver makes room."""
        while True:
            try:
                return self._memory.pack(files)
            except NoRoom as room:
                if not (
                    wait
                    or room.size_bytes < BESIDE_FROM_BYTES
                    or not self._is_beside
                    or self._wanted_bytes == room.size_bytes
                ):
                    self._wanted_bytes = room.size_bytes
                    self._in_flight, self._begun_at_s = None, time.monotonic()
                    self._start().allocate(room.size_bytes)
                    return None
                self._memory.grow(room.size_bytes)

    def _start(self) -> Saver:
        if self._saver is None:
            self._saver = self._run.start_saver(self._memory.fd)
        return self._saver

    def _save_here(self, plan: Plan, places: Mapping[str, tuple[int, int]], started: float) -> Done:
        images = {name: self._memory.view(place) for name, place in places.items()}
        error: OSError | None = None
        try:
            self._run.committer.save(plan, images, metrics_fd=self._run.metrics.fd)
        except OSError as refused:
            error = refused
        return Done("save", time.monotonic() - started, plan.step, error)
