"""The tracker process: follows metrics logs into W&B and TensorBoard, beside the training.

Started by `sweeper.tracking.tracker` with one end of a socket. It may hang or die at any moment:
nobody waits for it, and its successor repeats from the log what is lacking. It ends when its
worker ends, and ignores every signal that could end it earlier: a SIGTERM or SIGINT that reaches
W&B's service makes it drop rows that it has not sent.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import processes, rundir
from sweeper.errors import SweeperError
from sweeper.tracking.messages import Begin, Close, End, Message, decode
from sweeper.tracking.sinks import Feed, Sink
from sweeper.tracking.tensorboard_sink import TensorboardSink, event_dir

if TYPE_CHECKING:
    from sweeper.tracking.wandb_sink import WandbClient

POLL_S = 0.5
"""How often a log is looked at while its run goes on."""

NICENESS = 10
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Server:
    """Serves one worker over `connection` until it says `close` or goes away."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox = b""
        self._messages: deque[Message] = deque()
        self._client: WandbClient | None = None
        self._begin: Begin | None = None
        self._feeds: list[Feed] = []

    def serve(self) -> None:
        """Handle messages in order, and the current run's log between them."""
        while True:
            if self._is_readable(0.0 if self._messages else POLL_S if self._feeds else None):
                self._receive()
            if self._messages:
                message = self._messages.popleft()
                if isinstance(message, Close):
                    break
                self._handle(message)
            for feed in self._feeds:
                feed.pump()
        self._abandon()
        self._tell("closed")

    # --- messages --------------------------------------------------------------------------

    def _is_readable(self, timeout_s: float | None) -> bool:
        return bool(select.select([self._connection], [], [], timeout_s)[0])

    def _receive(self) -> None:
        data = self._connection.recv(1 << 16)
        if not data:
            self._abandon()
            raise ConnectionError("the worker is gone")
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        self._messages.extend(decode(line) for line in lines)

    def _tell(self, event: str, **fields: Any) -> None:
        run_id = {"run_id": self._begin.run_id} if self._begin else {}
        self._connection.sendall(json.dumps({"event": event, **run_id, **fields}).encode() + b"\n")

    def _warn(self, text: str) -> None:
        self._tell("warning", text=text)

    # --- runs ------------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        if isinstance(message, Begin):
            self._start(message)
        elif isinstance(message, End) and self._begin and self._begin.run_id == message.run_id:
            self._end(self._begin, message)

    def _start(self, begin: Begin) -> None:
        self._abandon()
        self._begin = begin
        if not self._is_ours():
            return
        if begin.settings.tensorboard.is_enabled:
            self._feed("TensorBoard", self._open_tensorboard)
        if begin.settings.wandb.is_enabled:
            self._feed("W&B", self._open_wandb)

    def _end(self, begin: Begin, end: End) -> None:
        for feed in self._feeds:
            feed.end(end)
        self._feeds = []
        self._tell("done", attempt=begin.attempt)
        self._begin = None

    def _abandon(self) -> None:
        """A run whose end nobody told: nothing is said about it to W&B either."""
        for feed in self._feeds:
            feed.abandon()
        self._feeds = []
        self._begin = None

    def _feed(self, name: str, open_sink: Any) -> None:
        assert self._begin is not None
        feed = Feed(
            name,
            open_sink=open_sink,
            log_path=Path(self._begin.run_dir) / rundir.METRICS_FILE,
            may_follow=self._is_ours,
            warn=self._warn,
        )
        self._feeds.append(feed)
        feed.pump()

    def _is_ours(self) -> bool:
        """Whether no newer owner has left its lease_epoch in the run directory.

        A new owner writes its marker before its trainer cuts the log, so asking when the log was
        replaced, and before anything is finished, is soon enough.
        """
        assert self._begin is not None
        try:
            return rundir.largest_epoch(Path(self._begin.run_dir)) <= self._begin.lease_epoch
        except (OSError, SweeperError):
            return True

    def _open_tensorboard(self) -> Sink:
        assert self._begin is not None
        directory = event_dir(self._begin)
        sink = TensorboardSink(directory, log_path=Path(self._begin.run_dir) / rundir.METRICS_FILE)
        self._tell("tensorboard", tensorboard_dir=str(directory))
        return sink

    def _open_wandb(self) -> Sink | None:
        assert self._begin is not None
        from sweeper.tracking.wandb_sink import RunMissing, WandbClient

        if self._client is None:
            self._client = WandbClient(self._warn, note=lambda text: self._tell("note", text=text))
        try:
            sink = self._client.open(self._begin)
        except RunMissing as error:
            self._tell("refused", text=str(error))
            return None
        if sink is not None:
            self._tell("wandb", **sink.place)
        return sink


def main(arguments: list[str]) -> None:
    """Serve the socket whose descriptor is the first argument, for the parent named by the second."""
    descriptor, parent_pid = (int(argument) for argument in arguments)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    processes.die_with_parent(parent_pid)
    os.nice(NICENESS)
    code = 1
    try:
        Server(socket.socket(fileno=descriptor)).serve()
        code = 0
    except BaseException:  # noqa: BLE001 - the last to hear of it; wandb may raise SystemExit, too
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # INVARIANT: wandb's exit hook never runs. It would tell W&B that a run has finished.
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
