"""The worker's handle on its tracker process, which carries rows to W&B and TensorBoard.

Standard library only. No method raises, and none but `close` waits: what the socket does not take
is kept in memory and sent at the next call.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeper.companion import Companion, Event
from sweeper.states import Outcome, State
from sweeper.tracking import orphans
from sweeper.tracking.messages import Begin, Close, End, TrackingSettings, encode

_REAP_S = 0.5


class Tracker:
    """One tracker process, or none when neither W&B nor TensorBoard is wanted.

    A process that dies costs one warning. It is started again at once while a run is open or not
    yet done (once per run, else at the next `begin`), and repeats from the metrics log what W&B
    or the event files lack.

    HAZARD: for the worker's main thread only: the process dies with the thread that created it.

    Args:
        settings: The config group `tracking`.
        log_path: Where the process's own output goes; default: nowhere. What matters comes as events.
    """

    def __init__(self, settings: TrackingSettings, *, log_path: Path | None = None) -> None:
        self.settings = settings
        self._tag = f"{os.getpid()}.{secrets.token_hex(8)}"
        # The client leaves temporary directories behind, two a run, when it does not end by itself.
        self._scratch = os.path.join(tempfile.gettempdir(), f"sweeper-tracker-{secrets.token_hex(8)}")
        self._companion = Companion(
            "sweeper.tracking.server",
            variables={orphans.TRACKER_VARIABLE: self._tag, "TMPDIR": self._scratch},
            log_path=log_path,
        )
        self._events: list[Event] = []
        self._unsettled: list[Begin | End] = []  # what a process started anew must be told again
        self._may_restart = False

    @classmethod
    def start(cls, settings: TrackingSettings, *, log_path: Path | None = None) -> Tracker:
        """Start the process, if there is anything for it to do."""
        tracker = cls(settings, log_path=log_path)
        if settings.is_enabled:
            tracker._launch()
        return tracker

    @property
    def pid(self) -> int | None:
        """The process, if it is there."""
        return self._companion.pid

    def fileno(self) -> int | None:
        """Readable when `poll` has something to return; None without a process.

        It changes when the process is started again: ask anew for each wait.
        """
        connection = self._companion.connection
        return connection.fileno() if connection else None

    def begin(
        self,
        *,
        run_dir: Path,
        run_id: str,
        sweep: str,
        wandb_run_id: str,
        attempt: int,
        lease_epoch: int,
        config: Mapping[str, Any],
        metric: str = "",
        direction: str = "minimize",
        start_step: int = 0,
        keep_last: int = 3,
    ) -> None:
        """An attempt begins: follow its metrics log. Best said when its trainer has cut the log."""
        if not self.settings.is_enabled:
            return
        begin = Begin(
            run_dir=os.path.abspath(run_dir),
            run_id=run_id,
            sweep=sweep,
            wandb_run_id=wandb_run_id,
            attempt=attempt,
            lease_epoch=lease_epoch,
            config=dict(config),
            settings=self.settings,
            metric=metric,
            direction=direction,
            start_step=start_step,
            keep_last=keep_last,
        )
        self._may_restart = True
        self._tell(begin)

    def end(
        self,
        *,
        run_id: str,
        outcome: Outcome,
        state: State,
        value: float | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """The attempt is over and its rows are in the log; the event `done` follows some time later."""
        if any(message.run_id == run_id for message in self._unsettled):
            self._tell(End(run_id, str(outcome), str(state), value, dict(summary or {})))

    def poll(self) -> list[Event]:
        """Move messages in both directions and return what came, without waiting.

        Events, each with `event` and mostly `run_id`: `wandb` (`wandb_url` or `wandb_dir`),
        `tensorboard` (`tensorboard_dir`), `warning` and `note` (`text`), `refused` (`text`:
        tracking.wandb.resume=must), `done` (`attempt`), `closed`.
        """
        self._exchange()
        events, self._events = self._events, []
        return events

    def close(self, timeout_s: float) -> list[Event]:
        """Let the process finish what it was told, at most `timeout_s` seconds, then end it.

        Returns:
            The last events; among them a warning if it had to be ended.
        """
        if self.pid is None:
            return self.poll()
        self._companion.send_line(encode(Close()))
        deadline = time.monotonic() + timeout_s
        self._unsettled, unsettled = [], self._unsettled
        while (connection := self._companion.connection) is not None and not self._is_closed():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                runs = ", ".join(sorted({message.run_id for message in unsettled})) or "nothing"
                self._warn(
                    f"tracking did not finish in {timeout_s:g} s and was ended (unfinished: {runs}); `sweeper sync` sends the rest"
                )
                break
            writers = [connection] if self._companion.has_unsent else []
            select.select([connection], writers, [], left_s)
            self._exchange()
        self._drop_process()
        return self.poll()

    # --- the process -----------------------------------------------------------------------

    def _launch(self) -> None:
        with contextlib.suppress(OSError):  # the client finds another place
            os.makedirs(self._scratch, mode=0o700, exist_ok=True)
        if why := self._companion.start():
            self._warn(f"tracking cannot be started: {why}; metrics.jsonl has every row")

    def _tell(self, message: Begin | End) -> None:
        try:
            data = encode(message)
        except (TypeError, ValueError) as error:
            self._warn(f"tracking of {message.run_id}: {error}")
            return
        self._unsettled.append(message)
        if self.pid is None:
            self._repeat()
        else:
            self._companion.send_line(data)

    def _repeat(self) -> None:
        """Start the process and tell it all that is not settled."""
        self._launch()
        for message in self._unsettled:
            self._companion.send_line(encode(message))

    def _exchange(self) -> None:
        events, is_gone = self._companion.exchange()
        for event in events:
            self._events.append(event)
            if event.get("event") == "done":
                self._settle(str(event.get("run_id")))
        if is_gone:
            self._lost()

    def _settle(self, run_id: str) -> None:
        """Forget the oldest begin and end of a run."""
        for index, message in enumerate(self._unsettled):
            if isinstance(message, End) and message.run_id == run_id:
                earlier = [m for m in self._unsettled[:index] if m.run_id != run_id]
                self._unsettled = earlier + self._unsettled[index + 1 :]
                return

    def _is_closed(self) -> bool:
        return any(event.get("event") == "closed" for event in self._events)

    def _lost(self) -> None:
        """The process is gone: warn once, and start it again if a run needs it."""
        if self._is_closed():
            self._drop_process()
            return
        code = self._drop_process()
        self._warn(f"the tracking process ended ({code}); metrics.jsonl has every row")
        if self._unsettled and self._may_restart:
            self._may_restart = False
            self._repeat()

    def _drop_process(self) -> str:
        """End what is left of the process and its W&B service; say how it ended."""
        had_one = self.pid is not None
        how = self._companion.drop()
        if had_one:
            orphans.end(orphans.TRACKER_VARIABLE, self._tag, wait_s=_REAP_S)
            shutil.rmtree(self._scratch, ignore_errors=True)
        return how

    def _warn(self, text: str) -> None:
        self._events.append({"event": "warning", "text": text})
