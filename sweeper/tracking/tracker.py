"""The worker's handle on its tracker process, which carries rows to W&B and TensorBoard.

Standard library only. No method raises, and none but `close` waits: what the socket does not take
is kept in memory and sent at the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeper.states import Outcome, State
from sweeper.tracking import orphans
from sweeper.tracking.messages import Begin, Close, End, TrackingSettings, encode

Event = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
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
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._inbox = b""
        self._outbox = b""
        self._events: list[Event] = []
        self._unsettled: list[Begin | End] = []  # what a process started anew must be told again
        self._may_restart = False
        self._tag = f"{os.getpid()}.{secrets.token_hex(8)}"

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
        return self._process.pid if self._process else None

    def fileno(self) -> int | None:
        """Readable when `poll` has something to return; None without a process.

        It changes when the process is started again: ask anew for each wait.
        """
        return self._socket.fileno() if self._socket else None

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
        self._flush()
        self._receive()
        events, self._events = self._events, []
        return events

    def close(self, timeout_s: float) -> list[Event]:
        """Let the process finish what it was told, at most `timeout_s` seconds, then end it.

        Returns:
            The last events; among them a warning if it had to be ended.
        """
        if self._process is None:
            return self.poll()
        self._send(encode(Close()))
        deadline = time.monotonic() + timeout_s
        self._unsettled, unsettled = [], self._unsettled
        while self._socket is not None and not self._is_closed():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                runs = ", ".join(sorted({message.run_id for message in unsettled})) or "nothing"
                self._warn(f"tracking did not finish in {timeout_s:g} s and was ended (unfinished: {runs})")
                break
            writers = [self._socket] if self._outbox else []
            select.select([self._socket], writers, [], left_s)
            self._flush()
            self._receive()
        self._drop_process()
        return self.poll()

    # --- the process -----------------------------------------------------------------------

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with contextlib.ExitStack() as stack:
                output: Any = subprocess.DEVNULL
                if self._log_path is not None:
                    output = stack.enter_context(open(self._log_path, "ab"))
                arguments = [str(theirs.fileno()), str(os.getpid())]
                self._process = subprocess.Popen(
                    # -P: a module of the user's in the current directory must not shadow ours.
                    [sys.executable, "-P", "-m", "sweeper.tracking.server", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # signals to the worker's group are not for it
                    env=_environment(self._tag),
                )
        except OSError as error:
            ours.close()
            self._warn(f"tracking cannot be started: {error}; metrics.jsonl has every row")
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket, self._inbox, self._outbox = ours, b"", b""

    def _tell(self, message: Begin | End) -> None:
        try:
            data = encode(message)
        except (TypeError, ValueError) as error:
            self._warn(f"tracking of {message.run_id}: {error}")
            return
        self._unsettled.append(message)
        if self._process is None:
            self._repeat()
        else:
            self._send(data)

    def _repeat(self) -> None:
        """Start the process and tell it all that is not settled."""
        self._launch()
        for message in self._unsettled:
            self._send(encode(message))

    def _send(self, data: bytes) -> None:
        self._outbox += data
        self._flush()

    def _flush(self) -> None:
        while self._socket is not None and self._outbox:
            try:
                sent = self._socket.send(self._outbox, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                return  # it is gone; `_receive` sees the end of the stream
            self._outbox = self._outbox[sent:]

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lost()
                return
            *lines, self._inbox = (self._inbox + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return
        self._events.append(event)
        if event.get("event") == "done":
            self._settle(str(event.get("run_id")))

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
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._outbox = b""
        if process is None:
            return "gone"
        process.kill()
        orphans.end(orphans.TRACKER_VARIABLE, self._tag)
        try:
            code = process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "it does not die"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _warn(self, text: str) -> None:
        self._events.append({"event": "warning", "text": text})


def _environment(tag: str) -> dict[str, str]:
    """The worker's environment without the database, where `sweeper` can be imported from a checkout."""
    environment = {**os.environ, orphans.TRACKER_VARIABLE: tag}
    environment.pop("SWEEPER_STORAGE", None)
    if _ROOT.name not in ("site-packages", "dist-packages"):
        known = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([*known, str(_ROOT)])
    return environment
