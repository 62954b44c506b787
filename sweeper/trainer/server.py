"""The warm server: torch imported once, then one fork a trainer.

`python -m sweeper.trainer.server FD WORKER_PID`. For each request it forks twice: the trainer
is orphaned on purpose, and the worker, a child subreaper, becomes its parent. So the worker
sees true exit codes and signals, and a trainer outlives a killed server.

HAZARD, before the fork: one thread only, no parallel region of OpenMP, no CUDA query, no
compilation. The user's module is imported in the child.
"""

from __future__ import annotations

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
    while True:
        data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST_BYTES, 2)
        if not data:
            return 0
        child = os.fork()
        if child == 0:
            _orphan(sock, json.loads(data), fds, worker_pid)
        os.waitpid(child, 0)
        for fd in fds:
            os.close(fd)


def warm_up() -> None:
    """Import torch and what a first optimizer pulls in. Nothing here may start a thread."""
    import numpy  # noqa: F401
    import omegaconf  # noqa: F401

    try:
        import torch
        import torch._dynamo  # the first optimizer imports it, for 1.2 s
        import torch.utils.data
    except ImportError:
        return
    import sweeper.torch  # noqa: F401

    torch.set_num_threads(1)


def _orphan(sock: socket.socket, request: dict[str, object], fds: list[int], worker_pid: int) -> None:
    """In the first child: fork the trainer and end, so that the worker adopts it."""
    try:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        sock.close()
        code = _trainer(request, fds, worker_pid)
    except BaseException:  # noqa: BLE001 - a forked child must never return into the server's frames
        sys.excepthook(*sys.exc_info())
        code = 1
    trainer_main.leave(code)


def _trainer(request: dict[str, object], fds: list[int], worker_pid: int) -> int:
    deadline = time.monotonic() + _REPARENT_WAIT_S
    while os.getppid() != worker_pid:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0002)
    spec = Spec(**request["spec"])  # type: ignore[arg-type]
    channel = Channel(socket.socket(fileno=fds[0]))
    return trainer_main.be_trainer(spec, channel, worker_pid=worker_pid, log_fd=fds[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
