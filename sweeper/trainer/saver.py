"""The saver: a niced process beside a trainer that hashes, writes and commits its checkpoints.

`python -m sweeper.trainer.saver FD CHANNEL_FD PARENT_PID`. The trainer puts the bytes of a
checkpoint into memory that both share and goes on training; it has at most one save in flight. The
saver talks to the worker by a channel of its own, so that a commit waits for no step boundary.
It never imports torch, and dies with its trainer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sweeper import processes
from sweeper.channel import Channel, ChannelClosed, Link, NoLink, WorkerLink
from sweeper.errors import Fenced, SweeperError
from sweeper.retention import Kept
from sweeper.trainer.commits import Committer, Plan

MAX_MESSAGE_BYTES = 1 << 20
NICENESS = 10
END_WAIT_S = 5.0
_POPULATE = mmap.MAP_SHARED | mmap.MAP_POPULATE


class SaverLost(SweeperError):
    """The saver was killed; the save in flight is lost, and so is the attempt."""


def map_shared(fd: int, size_bytes: int) -> mmap.mmap:
    """Map memory that is shared, with its pages at hand."""
    return mmap.mmap(fd, size_bytes, flags=_POPULATE)


# --- the trainer's side --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a request. `error` is None when it went well; `seconds` is how long it took."""

    kind: str
    seconds: float
    step: int = 0
    error: BaseException | None = None


class Saver:
    """A trainer's handle on its saver process.

    Args:
        memory_fd: The memory that holds the bytes of checkpoints.
        channel_fd: The saver's own channel to the worker; -1 without a worker.
        deadline_s: Until when the lease is known to hold; the worker tells of later ones.
        known_good: Checkpoints that need no verification.
    """

    def __init__(
        self, memory_fd: int, *, channel_fd: int, deadline_s: float, known_good: Mapping[int, Kept]
    ) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.is_busy = self._is_closed = False
        with theirs:
            self._process = start_process(theirs.fileno(), channel_fd)
        good = [asdict(kept) for kept in known_good.values()]
        self._send({"kind": "begin", "deadline_s": deadline_s, "known_good": good}, [memory_fd])

    def allocate(self, size_bytes: int) -> None:
        """Have the memory's pages made; the answer comes with `poll`."""
        self.is_busy = True
        self._send({"kind": "allocate", "size_bytes": size_bytes})

    def save(
        self, plan: Plan, images: Mapping[str, tuple[int, int]], *, size_bytes: int, metrics_fd: int
    ) -> None:
        """Have a checkpoint committed.

        Args:
            images: File name → (offset, size) of its bytes in the memory.
            size_bytes: Size of the memory.
        """
        self.is_busy = True
        request = {"kind": "save", "plan": asdict(plan), "images": images, "size_bytes": size_bytes}
        self._send(request, [metrics_fd])

    def poll(self, *, wait_s: float | None = 0.0) -> Done | None:
        """The answer to the request in flight, if it is there. Raises SaverLost."""
        if not self.is_busy or not select.select([self._sock], [], [], wait_s)[0]:
            return None
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._lost()
        self.is_busy = False
        answer = json.loads(data)
        return Done(answer["kind"], answer["seconds"], answer["step"], _error_of(answer["error"]))

    def close(self) -> None:
        """End the saver; a save in flight is dropped."""
        if self._is_closed:
            return
        self._is_closed = True
        self._sock.close()
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            death = os.pidfd_open(self._process.pid)
            # One that hangs in the kernel, on a file system that is gone, would never be waited for.
            if select.select([death], [], [], END_WAIT_S)[0]:
                self._process.wait()
            os.close(death)

    def _send(self, request: dict[str, Any], fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], fds or [])
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost() from None

    def _lost(self) -> SaverLost:
        code = self._process.wait()
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return SaverLost("the saver process ended in the middle of its work", why=why)


class Process(Protocol):
    """What is needed of a process that was started."""

    @property
    def pid(self) -> int:
        """Its number."""

    def kill(self) -> None:
        """SIGKILL."""

    def wait(self) -> int:
        """Wait for its end; returns the exit code, negative for a signal."""


def start_process(fd: int, channel_fd: int) -> Process:
    """Start a saver at the other end of `fd`. A fresh process: trainers with CUDA or threads cannot be forked."""
    with processes.signals_held():
        return subprocess.Popen(
            [sys.executable, "-m", "sweeper.trainer.saver", str(fd), str(channel_fd), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[open_fd for open_fd in (fd, channel_fd) if open_fd >= 0],
        )


def _error_of(raw: dict[str, Any] | None) -> BaseException | None:
    if raw is None:
        return None
    if raw["type"] == "OSError":
        return OSError(raw["errno"], raw["text"], raw["filename"])
    return (
        Fenced(raw["text"]) if raw["type"] == "Fenced" else RuntimeError(f"the saver failed: {raw['text']}")
    )


# --- the process ---------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Serve until the trainer is gone."""
    sock, channel_fd, parent_pid = socket.socket(fileno=int(argv[0])), int(argv[1]), int(argv[2])
    processes.die_with_parent(parent_pid)
    processes.ignore_signals()  # a save in flight is worth more than all of them
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    serve(sock, Channel(socket.socket(fileno=channel_fd)) if channel_fd >= 0 else None)
    return 0


def serve(sock: socket.socket, channel: Channel | None, *, link: Link | None = None) -> None:
    """Answer one request after the other; `link` is made from the channel, unless it is given."""
    begin, (memory_fd,) = _receive(sock)
    if link is None:
        link = NoLink() if channel is None else WorkerLink(channel, deadline_s=begin["deadline_s"])
    link.tell("saver", pid=os.getpid())
    committer = Committer(link)
    committer.known_good = {kept["step"]: Kept(**kept) for kept in begin["known_good"]}
    memory: mmap.mmap | None = None
    while True:
        try:
            _await_request(sock, channel, link)
            request, fds = _receive(sock)
        except ChannelClosed:
            return
        if not request:
            return
        started = time.monotonic()
        error: dict[str, Any] | None = None
        try:
            if request["kind"] == "allocate":
                os.posix_fallocate(memory_fd, 0, request["size_bytes"])
            else:
                if memory is None or len(memory) != request["size_bytes"]:
                    memory = map_shared(memory_fd, request["size_bytes"])
                _save(committer, request, memory, fds[0])
        except Fenced as fenced:
            error = {"type": "Fenced", "text": str(fenced)}
        except ChannelClosed:
            return
        except OSError as refused:
            error = {
                "type": "OSError",
                "errno": refused.errno or errno.EIO,
                "text": refused.strerror or str(refused),
                "filename": None if refused.filename is None else os.fsdecode(refused.filename),
            }
        except Exception as bug:  # noqa: BLE001 - the trainer says so in its log, and ends
            error = {"type": type(bug).__name__, "text": f"{type(bug).__name__}: {bug}"}
        for fd in fds:
            os.close(fd)
        step = request.get("plan", {}).get("step", 0)
        answer = {
            "kind": request["kind"],
            "seconds": time.monotonic() - started,
            "step": step,
            "error": error,
        }
        try:
            sock.send(json.dumps(answer).encode())
        except OSError:
            return


def _save(committer: Committer, request: dict[str, Any], memory: mmap.mmap, metrics_fd: int) -> None:
    view = memoryview(memory)
    images = {name: view[start : start + size] for name, (start, size) in request["images"].items()}
    committer.save(Plan(**request["plan"]), images, metrics_fd=metrics_fd)


def _await_request(sock: socket.socket, channel: Channel | None, link: Link) -> None:
    """Wait for the trainer, taking in what the worker says meanwhile."""
    while True:
        fds = [sock.fileno()] if channel is None else [sock.fileno(), channel.fileno()]
        if sock.fileno() in select.select(fds, [], [])[0]:
            return
        with contextlib.suppress(Fenced):  # it matters when there is something to write
            link.poll()


def _receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, 1)
    return (json.loads(data) if data else {}), list(fds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
