"""Worker ↔ trainer: JSON lines over one local socket; the only thing both sides share.

Trainer → worker, told:    hello, saver, started, progress, resumed, refused, result, pruned, preempted,
                           fenced, no_checkpoint, error
Trainer → worker, asked:   lease (may I rename?), committed (record it), report (shall I stop?)
Worker → trainer, told:    deadline (boot clock), stop (reason); and the answer to each question
"""

from __future__ import annotations

import json
import socket
from typing import Any, Protocol

from sweeper import clock
from sweeper.errors import Fenced, Released

Message = dict[str, Any]
MAX_LINE_BYTES = 16 << 20


class ChannelClosed(Released):
    """The other side is gone."""


class Channel:
    """One end of the socket. Sending blocks until the kernel took it; `receive` never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self.is_closed = False

    def fileno(self) -> int:
        """For a selector."""
        return self._sock.fileno()

    def send(self, kind: str, **data: Any) -> None:
        """Send one message. Raises ChannelClosed."""
        line = json.dumps({"kind": kind, **data}, allow_nan=True).encode() + b"\n"
        try:
            self._sock.sendall(line)
        except (BrokenPipeError, ConnectionResetError, OSError) as error:
            self.is_closed = True
            raise ChannelClosed("the channel is closed", why=str(error)) from error

    def offer(self, kind: str, **data: Any) -> bool:
        """Send one message, unless the other side has not read for so long that nothing more fits.

        Returns:
            Whether it was sent. Raises ChannelClosed.
        """
        line = json.dumps({"kind": kind, **data}, allow_nan=True).encode() + b"\n"
        try:
            # A short line fits whole, or not at all: a local stream takes it in one buffer.
            return self._sock.send(line, socket.MSG_DONTWAIT) == len(line)
        except BlockingIOError:
            return False
        except OSError as error:
            self.is_closed = True
            raise ChannelClosed("the channel is closed", why=str(error)) from error

    def receive(self, *, wait_s: float | None = 0.0) -> list[Message]:
        """All messages that have arrived; `is_closed` is set at the end of the stream.

        Args:
            wait_s: Wait so long for the first byte; None waits for ever.
        """
        self._sock.settimeout(wait_s)
        try:
            while not self.is_closed:
                data = self._sock.recv(1 << 16)
                if not data:
                    self.is_closed = True
                self._buffer += data
                if len(self._buffer) > MAX_LINE_BYTES:
                    raise ChannelClosed("the other side sent a line without end")
                self._sock.settimeout(0.0)
        except (BlockingIOError, TimeoutError):
            pass
        except ConnectionResetError:
            self.is_closed = True
        finally:
            self._sock.settimeout(None)
        return self._take_lines()

    def _take_lines(self) -> list[Message]:
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close this end; the other side sees the end of the stream."""
        self.is_closed = True
        self._sock.close()


class Link(Protocol):
    """What a training needs of its surroundings: a worker, or nobody at all."""

    @property
    def stop_reason(self) -> str | None:
        """Why the training should stop at the next step boundary, or None."""

    def poll(self) -> None:
        """Take in what has arrived. Raises Fenced once the lease may be over."""

    def tell(self, kind: str, **data: Any) -> None:
        """Say something that needs no answer."""

    def ask(self, kind: str, **data: Any) -> Message:
        """Ask and wait for the answer. Raises Fenced when the lease is lost."""


class WorkerLink:
    """A trainer's link to its worker."""

    def __init__(self, channel: Channel, *, deadline_s: float) -> None:
        self._channel = channel
        self.deadline_s = deadline_s
        self._answers: list[Message] = []
        self._stop_reason: str | None = None

    @property
    def stop_reason(self) -> str | None:
        return self._stop_reason

    def poll(self) -> None:
        self._take(self._channel.receive())
        self.check_deadline()

    def check_deadline(self) -> None:
        """Raise Fenced past the deadline of the last heartbeat: a stopped worker's trainer ends too."""
        if clock.boot_s() > self.deadline_s:
            raise Fenced(
                "the lease of this run may be over",
                why="its worker has not renewed it in time",
                do="Whoever owns the run goes on from the last checkpoint.",
            )

    def tell(self, kind: str, **data: Any) -> None:
        self._channel.send(kind, **data)

    def ask(self, kind: str, **data: Any) -> Message:
        self.poll()
        self._channel.send(kind, **data)
        while not self._answers:
            # A stopped worker never answers; past its deadline this attempt is over all the same.
            left_s = max(0.0, self.deadline_s - clock.boot_s())
            self._take(self._channel.receive(wait_s=left_s + 0.01))
            if not self._answers:
                self.check_deadline()
        answer = self._answers.pop(0)
        self.check_deadline()
        if answer.get("fenced"):
            raise Fenced("the lease of this run is lost", why=str(answer["fenced"]))
        return answer

    def _take(self, messages: list[Message]) -> None:
        for message in messages:
            if message["kind"] == "deadline":
                self.deadline_s = message["at"]
            elif message["kind"] == "stop":
                self._stop_reason = message["reason"]
            else:
                self._answers.append(message)
        if self._channel.is_closed:
            raise ChannelClosed("the worker of this training is gone")


class NoLink:
    """The link of a training that no worker stands behind: everything is allowed."""

    stop_reason: str | None = None

    def poll(self) -> None:
        """Nothing arrives."""

    def tell(self, kind: str, **data: Any) -> None:
        """Complaints are printed, for nobody else will."""
        if kind == "complaint":
            print(f"[CHECKPOINT] {data['text']}", flush=True)

    def ask(self, kind: str, **data: Any) -> Message:
        """Yes; and nobody prunes."""
        return {"prune": False}
