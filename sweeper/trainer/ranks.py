"""A training on several ranks: torchrun with the c10d rendezvous, one process a rank.

`python -m sweeper.trainer.ranks FD LOG_FD SAVER_FD PARENT_PID` runs torchrun's agent, whose end tells
how the first rank that failed had ended. Rank 0 fetches the request and the channels from it and
talks to the worker; the others only follow it, through torch.distributed. A rank that dies ends them
all at once; one that hangs, when the others have waited `lease.ranks_s` for it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from sweeper import processes
from sweeper.channel import Channel, NoLink
from sweeper.checkpoints import Manifest
from sweeper.trainer import main as trainer_main
from sweeper.trainer.run import Run, Spec, Stop, in_attempt

MAX_REQUEST_BYTES = 1 << 20
NUM_FDS = 3
SOCKET_VARIABLE = "SWEEPER_RANKS_SOCKET"


class Follower(Run):
    """What the training function gets on any rank but the first: it writes nothing and asks nobody."""

    def open_metrics(self, offset: int) -> None:
        """Rank 0 keeps the log."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Rank 0 keeps the log."""

    def judge(self, step: int, value: float) -> None:
        """Rank 0 asks the pruner."""
        self.last_report = (step, value)

    def start(self, *, step: int = 0, total_steps: int | None = None) -> None:
        self.start_step = step

    def refuse(self, step: int, reason: str) -> None:
        """Rank 0 says so."""

    def resumed(self, manifest: Manifest, *, refused: Iterable[Path]) -> None:
        """Rank 0 moves refused checkpoints out of the way."""


# --- torchrun's agent ----------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run all ranks; returns the exit code of the first that failed, negative for a signal."""
    *fds, parent_pid = map(int, argv)
    processes.die_with_parent(parent_pid)
    request = sys.stdin.read()
    spec = Spec(**json.loads(request)["spec"])
    os.dup2(fds[1], 1)
    os.dup2(fds[1], 2)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="sweeper-ranks-") as directory:
        os.environ[SOCKET_VARIABLE] = f"{directory}/rank0"
        os.environ[processes.ATTEMPT_VARIABLE] = in_attempt(spec.run_dir, spec.lease_epoch)
        listener = _offer(os.environ[SOCKET_VARIABLE])
        threading.Thread(target=_hand_out, args=(listener, request.encode(), fds), daemon=True).start()
        try:
            torchrun.main(
                [
                    f"--nproc-per-node={spec.num_ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                    f"--rdzv-id={os.getpid()}", "--max-restarts=0", "--local-addr=127.0.0.1",
                    "-m", "sweeper.trainer.rank",
                ]
            )  # fmt: skip
        except ChildFailedError as error:
            failure = _first_of(error.failures.values())
            print(f"[RUN] rank {failure.local_rank} ended first, with code {failure.exitcode}", flush=True)
            return int(failure.exitcode)
    return 0


def _first_of(failures: Iterable[Any]) -> Any:
    """The failure that was first. torchrun ends the other ranks by SIGTERM, within the same second."""
    own = [failure for failure in failures if failure.exitcode != -signal.SIGTERM]
    return min(own or failures, key=lambda failure: failure.timestamp)


def _offer(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(1)
    return listener


def _hand_out(listener: socket.socket, request: bytes, fds: list[int]) -> None:
    """Give rank 0 the request and the channels, and keep none: their end must be seen."""
    connection, _ = listener.accept()
    with connection:
        socket.send_fds(connection, [request], fds)
    for fd in fds:
        os.close(fd)


def end_as(code: int) -> NoReturn:
    """End with an exit code, or by the signal that a negative one stands for."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


# --- one rank ------------------------------------------------------------------------------


def be_rank() -> int:
    """Train as one of the ranks that torchrun started; returns the exit code."""
    import torch.distributed as dist

    processes.die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    channel, saver_fd, request = (None, -1, {"spec": {}}) if rank else _fetch(os.environ[SOCKET_VARIABLE])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    key = f"sweeper/{os.environ['TORCHELASTIC_RUN_ID']}/spec"
    if rank == 0:
        store.set(key, json.dumps(request["spec"]))
    spec = Spec(**json.loads(store.get(key)))
    dist.init_process_group(spec.backend, timeout=timedelta(seconds=spec.ranks_s))
    try:
        if channel is not None:
            return trainer_main.be_first(spec, channel, saver_fd=saver_fd)
        return _follow(spec)
    finally:
        dist.destroy_process_group()


def _fetch(path: str) -> tuple[Channel, int, dict[str, Any]]:
    """Rank 0's request and channels, from the server that holds them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        data, fds, _, _ = socket.recv_fds(sock, MAX_REQUEST_BYTES, NUM_FDS)
    channel_fd, log_fd, saver_fd = fds
    os.close(log_fd)  # it is this process's output already
    return Channel(socket.socket(fileno=channel_fd)), saver_fd, json.loads(data)


def _follow(spec: Spec) -> int:
    run = Follower(spec, NoLink())
    try:
        trainer_main.train(run)
        run.finish()
    except Stop as stop:
        print(f"[RUN] rank {os.environ['RANK']}: {stop}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    end_as(main(sys.argv[1:]))
