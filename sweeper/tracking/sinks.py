"""What a place that rows are sent to looks like, and how one log is fed into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from sweeper.states import State
from sweeper.tracking.messages import End
from sweeper.tracking.metrics import STEP, Follower, Row

REOPEN_S = 60.0


class Sink(Protocol):
    """W&B or TensorBoard for one run. Each method may raise anything: it is foreign code."""

    next_step: int
    """Rows of earlier steps are there already."""

    def observe(self, step: int, row: Row) -> None:
        """See the one row of a step, also of those that are there already; steps only go up."""

    def write(self, step: int, row: Row) -> None:
        """Send the one row of a step that is not there yet."""

    def flush(self) -> None:
        """What was written shall be seen by readers."""

    def finish(self, end: End) -> None:
        """Close in order."""

    def abandon(self) -> None:
        """Let go at once, saying nothing more to anybody."""


class Feed:
    """Feeds one metrics log into one sink, each step once, and survives the sink.

    Rows of one step are merged; the newest step is held back until it is complete, so that a step
    is never there in part. A sink that fails is opened again and told what it lacks: at once, then
    no more often than each `REOPEN_S`, and at the end. One that cannot be opened is left alone.

    Args:
        name: For messages, e.g. "W&B".
        open_sink: Makes the sink, or None when there is nothing to do; called again after a failure.
        log_path: The metrics log.
        may_follow: False when the run has a newer owner.
        warn: Takes texts for people.
    """

    def __init__(
        self,
        name: str,
        *,
        open_sink: Callable[[], Sink | None],
        log_path: Path,
        may_follow: Callable[[], bool],
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._open_sink = open_sink
        self._log_path = log_path
        self._may_follow = may_follow
        self._warn = warn
        self._clock = clock
        self._reopen_at_s = 0.0
        self._has_failed = False
        self._sink: Sink | None = None
        self._open()

    def pump(self) -> None:
        """Send what came since the last call."""
        if self._has_failed and self._clock() >= self._reopen_at_s:
            self._open()
        self._guarded(self._drain)

    def end(self, end: End) -> None:
        """Send the rest and close: in order, or at once when the run has a newer owner."""
        if self._has_failed:
            self._open()
        self._guarded(lambda sink: self._finish(sink, end), tries=1)
        self.abandon()

    def abandon(self) -> None:
        """Let go of the sink at once."""
        sink, self._sink = self._sink, None
        self._follower.close()
        if sink is not None:
            try:
                sink.abandon()
            except Exception as error:  # noqa: BLE001 - foreign code
                self._warn(f"{self.name}: {_text(error)}")

    def _open(self) -> None:
        self._has_failed = False
        self._follower = Follower(self._log_path, may_follow=self._may_follow)
        self._rows = _Steps()
        if not self._may_follow():
            return
        try:
            self._sink = self._open_sink()
        except Exception as error:  # noqa: BLE001 - foreign code
            self._warn(f"{self.name} cannot be used for this run: {_text(error)}")

    def _guarded(self, act: Callable[[Sink], None], *, tries: int = 0) -> None:
        """Act; after a failure open the sink again, if that is due or `tries` are left."""
        while self._sink is not None:
            try:
                act(self._sink)
                return
            except Exception as error:  # noqa: BLE001 - foreign code
                self._warn(f"{self.name} failed: {_text(error)}")
            self.abandon()
            self._has_failed = True
            if self._clock() < self._reopen_at_s and tries <= 0:
                return
            tries -= 1
            self._reopen_at_s = self._clock() + REOPEN_S
            self._open()

    def _drain(self, sink: Sink) -> None:
        for row in self._follower.rows():
            for step, values in self._rows.add(row):
                _write(sink, step, values)
        if self._follower.is_over:
            self.abandon()
        else:
            sink.flush()

    def _finish(self, sink: Sink, end: End) -> None:
        self._drain(sink)
        if self._sink is None or not self._may_follow():
            self.abandon()
            return
        # A run that goes on later may have more rows of this step: its next attempt sends them all.
        if State(end.state).is_final:
            for step, values in self._rows.rest():
                _write(sink, step, values)
        sink.finish(end)
        self._sink = None


def _write(sink: Sink, step: int, row: Row) -> None:
    sink.observe(step, row)
    if step >= sink.next_step:
        sink.write(step, row)
        sink.next_step = step + 1


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class _Steps:
    """Merges consecutive rows of one step."""

    def __init__(self) -> None:
        self._step = -1
        self._held: Row = {}

    def add(self, row: Row) -> Iterator[tuple[int, Row]]:
        step = int(row[STEP])
        values = {key: value for key, value in row.items() if key != STEP}
        if step != self._step:
            yield from self.rest()
            self._step = step
        self._held.update(values)

    def rest(self) -> Iterator[tuple[int, Row]]:
        if self._held:
            held, self._held = self._held, {}
            yield self._step, held
