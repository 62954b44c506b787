"""The warm server: torch imported once, then one fork a trainer.

`python -m sweeper.trainer.server FD WORKER_PID`. It forks twice for each trainer, which is orphaned
on purpose: the worker, a child subreaper, becomes its parent. So the worker sees true exit codes
and signals, and a trainer outlives a killed server. The next trainer is forked while this one
trains, and waits.

HAZARD, before the fork: one thread only, no parallel region of OpenMP, no CUDA query, no
compilation. The user's module is imported in the child.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import socket
import sys
import time

from sweeper import processes
from sweeper.channel import Channel
from sweeper.trainer import main as trainer_main
from sweeper.trainer.run import Spec

MAX_REQUEST_BYTES = 1 << 20
_REPARENT_WAIT_S = 10.0


def main(argv: list[str]) -> int:
    """Import what every trainer needs, then serve until the worker is gone."""
    worker_pid = int(argv[1])
    processes.die_with_parent(worker_pid)
    sock = socket.socket(fileno=int(argv[0]))
    warm_up()
    gc.collect()
    gc.freeze()
    atexit._clear()  # torch's own handlers would cost each trainer 0.1 s at its end
    parked = park(sock, worker_pid)
    while True:
        data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST_BYTES, 2)
        if not data:
            return 0
        while not _hand_over(parked, data, fds):
            parked = park(sock, worker_pid)
        for fd in fds:
            os.close(fd)
        parked.close()
        parked = park(sock, worker_pid)


def park(sock: socket.socket, worker_pid: int) -> socket.socket:
    """Fork the next trainer ahead of its time; it waits for its request, or for our end."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        sock.close()
        ours.close()
        _orphan(theirs, worker_pid)
    os.waitpid(child, 0)
    theirs.close()
    return ours


def _hand_over(parked: socket.socket, data: bytes, fds: list[int]) -> bool:
    """False when the parked trainer is gone."""
    try:
        socket.send_fds(parked, [data], fds)
        return parked.recv(1) == b"."
    except OSError:
        return False


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


def _orphan(parked: socket.socket, worker_pid: int) -> None:
    """In the first child: fork the trainer and end, so that the worker adopts it."""
    try:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        _wait_for_worker(worker_pid)
        processes.die_with_parent(worker_pid)
        code = _serve_one(parked, worker_pid)
    except BaseException:  # noqa: BLE001 - a forked child must never return into the server's frames
        sys.excepthook(*sys.exc_info())
        code = 1
    trainer_main.leave(code)


def _wait_for_worker(worker_pid: int) -> None:
    deadline = time.monotonic() + _REPARENT_WAIT_S
    while os.getppid() != worker_pid:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)


def _serve_one(parked: socket.socket, worker_pid: int) -> int:
    data, fds, _, _ = socket.recv_fds(parked, MAX_REQUEST_BYTES, 2)
    if not data:
        return 0  # the server is gone
    parked.send(b".")
    parked.close()
    spec = Spec(**json.loads(data)["spec"])
    channel = Channel(socket.socket(fileno=fds[0]))
    return trainer_main.be_trainer(spec, channel, worker_pid=worker_pid, log_fd=fds[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
