"""The parent of a worker's trainers: torch imported once, then one fork a trainer.

`python -m sweeper.trainer.server KIND FD PARENT_PID`, where KIND is

- `warm`: imports torch, and forks each trainer. The next one is forked while this one trains, and
  waits parked.
- `plain`: starts each trainer as a fresh process: what wants CUDA must not be forked, and several
  ranks come from torchrun.
- `template`: imports torch for a whole launch, and forks a `warm` server for each worker.

A server ends when its worker's socket does, and its trainers with it (parent-death signal). When a
trainer has ended, whatever it left running is ended too, and the worker is told the wait status.

HAZARD, before a fork: one thread only, no parallel region of OpenMP, no CUDA query, no
compilation. The user's module is imported in the child.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, Protocol

from sweeper import processes
from sweeper.channel import Channel
from sweeper.trainer import main as trainer_main
from sweeper.trainer.run import Spec

MAX_REQUEST_BYTES = 1 << 20
NUM_FDS = 3  # a trainer's channel, its log, and its saver's channel


def main(argv: list[str]) -> int:
    """Serve until the other end of the socket is closed."""
    kind, sock, parent_pid = argv[0], socket.socket(fileno=int(argv[1])), int(argv[2])
    processes.die_with_parent(parent_pid)
    processes.ignore_signals()  # so do all it starts
    if kind == "plain":
        serve(sock, Plain())
        return 0
    warm_up()
    gc.collect()
    gc.freeze()
    atexit._clear()  # torch's own handlers would cost each trainer 0.1 s at its end
    if kind == "template":
        serve_servers(sock)
    else:
        serve(sock, Warm(sock))
    return 0


def warm_up() -> None:
    """Import torch and what a first optimizer pulls in. Nothing here may start a thread."""
    import numpy  # noqa: F401
    import omegaconf  # noqa: F401
    import yaml  # noqa: F401

    try:
        import torch
        import torch._dynamo  # the first optimizer imports it, for 1.2 s
        import torch.utils.data
    except ImportError:
        return
    import sweeper.torch  # noqa: F401

    torch.set_num_threads(1)
    # It notes a stack trace for each kind of device, for which it reads the source of all frames: 2 ms
    # a trainer, unless the lines are cached already.
    torch.manual_seed(0)


# --- servers of a launch -------------------------------------------------------------------


def serve_servers(sock: socket.socket) -> None:
    """Fork a warm server for each request, which brings its environment and its socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # servers are nobody's to wait for
    while True:
        data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST_BYTES, 1)
        if not data:
            return
        if os.fork() == 0:
            _in_child(partial(_be_server, sock, json.loads(data)["environment"], fds[0]))
        os.close(fds[0])


def _be_server(template: socket.socket, environment: dict[str, str], fd: int) -> int:
    template.close()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    sock = socket.socket(fileno=fd)
    serve(sock, Warm(sock))
    return 0


# --- trainers of a worker ------------------------------------------------------------------


class Kind(Protocol):
    """A way to start trainers."""

    def start(self, data: bytes, fds: list[int]) -> int:
        """Start one with a request as it came; returns its pid, a child of this process."""

    def prepare(self) -> None:
        """Make ready for the next one."""

    def spared(self) -> int | None:
        """A child that is no trainer's leftover."""


def serve(sock: socket.socket, kind: Kind) -> None:
    """Start trainers one after the other, and tell how each ended."""
    processes.adopt_orphans()
    processes.outlive_parent()  # the socket's end is seen, and what a trainer started is ended first
    kind.prepare()
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST_BYTES, NUM_FDS)
        except ConnectionResetError:  # the worker was killed with something unread
            return
        if not data:
            return
        pid = kind.start(data, fds)
        for fd in fds:
            os.close(fd)
        kind.prepare()
        status = _wait(pid, sock)
        _end_leftovers(kind)
        if status is None:
            return
        with contextlib.suppress(OSError):  # the worker is gone: seen at the next turn
            sock.send(json.dumps({"pid": pid, "status": status}).encode())


def _wait(pid: int, sock: socket.socket) -> int | None:
    """The wait status of a trainer; None when the worker went first, and the trainer must go too."""
    death = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(death, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)  # while a trainer runs only an end can come
            ready = [key.fd for key, _ in selector.select()]
        return os.waitpid(pid, 0)[1] if death in ready else None
    finally:
        os.close(death)


def _end_leftovers(kind: Kind) -> None:
    """What the trainer left behind is our child by now; ending it may orphan more."""
    while left := set(processes.children()) - {kind.spared()}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


class Plain:
    """A fresh process for each trainer."""

    def start(self, data: bytes, fds: list[int]) -> int:
        module = "ranks" if json.loads(data)["spec"]["num_ranks"] > 1 else "main"
        argv = [sys.executable, "-m", f"sweeper.trainer.{module}", *map(str, (*fds, os.getpid()))]
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=2, pass_fds=fds, start_new_session=True
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its status says so
            process.stdin.write(data)
            process.stdin.close()
        return process.pid  # `serve` waits for it, not Popen

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def spared(self) -> int | None:
        return None


class Warm:
    """A fork for each trainer, one ahead. `serving` is closed in the children."""

    def __init__(self, serving: socket.socket) -> None:
        self._serving = serving
        self._parked: tuple[int, socket.socket] | None = None

    def start(self, data: bytes, fds: list[int]) -> int:
        while True:
            self.prepare()
            assert self._parked is not None
            pid, waiting = self._parked
            self._parked = None
            with waiting:
                if _hand_over(waiting, data, fds):
                    return pid
            os.waitpid(pid, 0)

    def prepare(self) -> None:
        """Fork the next trainer ahead of its time; it waits for its request, or for our end."""
        if self._parked is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._serving.close()
            ours.close()
            _in_child(lambda: _serve_one(theirs, server_pid))
        theirs.close()
        self._parked = (pid, ours)

    def spared(self) -> int | None:
        return None if self._parked is None else self._parked[0]


def _hand_over(waiting: socket.socket, data: bytes, fds: list[int]) -> bool:
    """False when the parked trainer is gone."""
    try:
        socket.send_fds(waiting, [data], fds)
        return waiting.recv(1) == b"."
    except OSError:
        return False


def _serve_one(parked: socket.socket, server_pid: int) -> int:
    processes.die_with_parent(server_pid)
    os.setsid()
    data, fds, _, _ = socket.recv_fds(parked, MAX_REQUEST_BYTES, NUM_FDS)
    if not data:
        return 0  # the server is gone
    parked.send(b".")
    parked.close()
    spec = Spec(**json.loads(data)["spec"])
    channel = Channel(socket.socket(fileno=fds[0]))
    return trainer_main.be_trainer(spec, channel, log_fd=fds[1], saver_fd=fds[2])


def _in_child(act: Callable[[], Any]) -> NoReturn:
    """Run `act` in a forked child, which must never return into the server's frames."""
    try:
        code = int(act())
    except BaseException:  # noqa: BLE001 - whatever it is, it ends here
        sys.excepthook(*sys.exc_info())
        code = 1
    trainer_main.leave(code)


if __name__ == "__main__":
    trainer_main.leave(main(sys.argv[1:]))  # torch's finalizers would only cost time
