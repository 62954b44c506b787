"""A training on several ranks: torchrun with the c10d rendezvous, one process a rank.

`python -m sweeper.trainer.ranks FD LOG_FD SAVER_FD PARENT_PID` runs torchrun's agent, whose end tells
how the first rank that failed had ended. Rank 0 fetches the request and the channels from it and
talks to the worker; the others only follow it, through torch.distributed. A rank that dies ends them
all at once; one that hangs, when the others have waited `lease.ranks_s` for it. What another rank than 0
raised it leaves behind, and the agent tells the worker.
"""

from __future__ import annotations

import contextlib
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

from sweeper import processes, rundir
from sweeper.channel import Channel, ChannelClosed, Message, NoLink
from sweeper.manifests import Manifest
from sweeper.trainer import main as trainer_main
from sweeper.trainer import nodes
from sweeper.trainer.run import Run, Spec, in_attempt

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

    ended_here = kill_at_once()
    with tempfile.TemporaryDirectory(prefix="sweeper-ranks-") as directory:
        os.environ[SOCKET_VARIABLE] = f"{directory}/rank0"
        os.environ[processes.ATTEMPT_VARIABLE] = in_attempt(spec.run_dir, spec.lease_epoch)
        is_alone, per_node = spec.num_nodes == 1, spec.num_ranks // spec.num_nodes
        address = "127.0.0.1" if is_alone else nodes.here()
        endpoint = f"{address}:{0 if is_alone else nodes.free_port()}"
        run_id = f"{in_attempt(spec.run_dir, spec.lease_epoch)}:{os.getpid()}"
        if not is_alone:
            log = str(rundir.attempt_log(Path(spec.run_dir), spec.attempt))
            attempt = os.environ[processes.ATTEMPT_VARIABLE]
            nodes.order(nodes.Order(endpoint, run_id, spec.num_nodes, per_node, attempt, log))
        handover = _Handover(
            os.environ[SOCKET_VARIABLE], request.encode(), fds
        )  # a thread: after all forks of ours
        try:
            torchrun.main(
                nodes.torchrun_arguments(
                    endpoint,
                    run_id,
                    num_nodes=spec.num_nodes,
                    ranks_per_node=per_node,
                    address=address,
                    is_host=True,
                )
            )
        except ChildFailedError as error:
            code, ending = first_failure(error, directory, ended_here)
            if not is_alone and ending.get("is_others"):
                code, ending = nodes.failure_of_others(spec) or (code, ending)
            if ending:
                handover.tell(ending)
            return code
        finally:
            if not is_alone:
                nodes.withdraw()
    return 0


def first_failure(error: Any, directory: str, ended_here: set[int]) -> tuple[int, Message]:
    """How the rank of this node that failed first ended: exit code, and what it left to be told, if anything.

    Args:
        error: torchrun's ChildFailedError.
        ended_here: Local ranks that we ended ourselves.
    """
    failures = {rank: each for rank, each in error.failures.items() if each.local_rank not in ended_here}
    endings = {rank: _ending_left(directory, rank) for rank in failures}
    first = min(failures, key=lambda rank: _comes_after(failures[rank], endings[rank]))
    code, ending = int(failures[first].exitcode), endings[first]
    print(f"[RUN] rank {first} ended first, with code {code}", flush=True)
    return code, {**ending, "reason": f"rank {first}: {ending['reason']}"} if ending else {}


def kill_at_once() -> set[int]:
    """Have torchrun end the ranks that are left by SIGKILL; returns where it notes which they were.

    It would give them 30 s after SIGTERM, which no option shortens, and one that hangs takes them
    all. What they have to say is said by then, or is worth nothing.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    ended: set[int] = set()
    close = SubprocessContext._close

    def kill(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        left = [rank for rank, handler in self.subprocess_handlers.items() if handler.proc.poll() is None]
        ended.update(left)
        close(self, signal.SIGKILL, timeout)

    SubprocessContext._close = kill  # type: ignore[method-assign]
    return ended


def _ending_left(directory: str, rank: int) -> Message:
    """What a rank that follows has left to be told of its end; empty if it said nothing."""
    try:
        return json.loads(Path(directory, f"ending.{rank}").read_bytes())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


def _comes_after(failure: Any, ending: Message) -> tuple[bool, int, int]:
    """Sorts failures: those that came of another rank's end behind that one."""
    return bool(ending.get("is_others")), failure.timestamp, failure.local_rank


class _Handover:
    """Gives rank 0 the request and the channels, and tells the worker what rank 0 could not.

    A channel is kept only until rank 0 has told how the attempt ended: then its end must be seen.
    """

    def __init__(self, path: str, request: bytes, fds: list[int]) -> None:
        self._channel_fd, self._fds, self._request = fds[0], fds, request
        self._has_told = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # rank 0 never came
            return
        with connection:
            socket.send_fds(connection, [self._request], self._fds)
            for fd in self._fds[1:]:
                os.close(fd)
            self._has_told = bool(connection.recv(1))
        if self._has_told:
            os.close(self._channel_fd)

    def tell(self, ending: Message) -> None:
        """Tell the worker how the attempt ended, unless rank 0 has. All ranks are gone by now."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        if not self._has_told:
            with contextlib.suppress(ChannelClosed):
                Channel(socket.socket(fileno=self._channel_fd)).send(**ending)


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
    processes.ignore_signals()
    rank = int(os.environ["RANK"])
    first = _First(os.environ[SOCKET_VARIABLE]) if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    key = f"sweeper/{os.environ['TORCHELASTIC_RUN_ID']}/spec"
    if first is not None:
        store.set(key, json.dumps(first.request["spec"]))
    spec = Spec(**json.loads(store.get(key)))
    dist.init_process_group(spec.backend, timeout=timedelta(seconds=spec.ranks_s))
    code = _follow(spec, rank) if first is None else first.train(spec)
    if code == 0:
        dist.destroy_process_group()
    return code


class _First:
    """Rank 0, which has the request and the channels from the process that holds them."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.connect(path)
        data, (channel_fd, log_fd, self._saver_fd), _, _ = socket.recv_fds(
            self._sock, MAX_REQUEST_BYTES, NUM_FDS
        )
        os.close(log_fd)  # it is this process's output already
        self._channel = Channel(socket.socket(fileno=channel_fd))
        self.request: dict[str, Any] = json.loads(data)

    def train(self, spec: Spec) -> int:
        """Train and tell the worker the outcome; returns the exit code."""
        code = trainer_main.be_first(spec, self._channel, saver_fd=self._saver_fd)
        self._sock.send(b".")
        return code


def _follow(spec: Spec, rank: int) -> int:
    """Train on another rank; what it raised, if anything, is left where the worker will be told of it."""
    code, ending = trainer_main.ending_of(Follower(spec, NoLink()))
    if ending["kind"] in ("result", "pruned", "preempted"):
        return 0
    directory = Path(os.environ[SOCKET_VARIABLE]).parent
    (directory / f"ending.{rank}").write_text(json.dumps(ending))
    return code


if __name__ == "__main__":
    end_as(main(sys.argv[1:]))
