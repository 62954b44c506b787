"""Ranks of one training on several nodes of a SLURM job: one torchrun agent a node, started through srun.

The agent beside the worker is where the rendezvous is, and where rank 0 has to be, which holds the
channels to the worker. c10d numbers nodes by the order of their addresses' texts: the others give
one that comes behind every name, and is used for nothing else.

`python -m sweeper.trainer.nodes ENDPOINT ID NNODES NPROC ATTEMPT` is an agent on another node.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeper import processes, rundir
from sweeper.channel import Message
from sweeper.trainer.run import Spec, in_attempt

OTHERS_WAIT_S = 10.0
_LAST = "~"
"""Sorts behind letters, digits and dots."""


def here(environment: Mapping[str, str] = os.environ) -> str:
    """A name of this node by which the others reach it."""
    for name in (environment.get("SLURMD_NODENAME"), socket.gethostname()):
        try:
            if name and socket.getaddrinfo(name, None):
                return name
        except OSError:
            continue
    return "127.0.0.1"


def free_port() -> int:
    """A port of this node that nobody listens on."""
    with socket.create_server(("", 0)) as free:
        return int(free.getsockname()[1])


def torchrun_arguments(
    endpoint: str, run_id: str, *, num_nodes: int, ranks_per_node: int, address: str, is_host: bool
) -> list[str]:
    """What torchrun is told on one node."""
    return [
        f"--nnodes={num_nodes}", f"--nproc-per-node={ranks_per_node}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={run_id}", f"--rdzv-conf=is_host={int(is_host)}", "--max-restarts=0", f"--local-addr={address}",
        "--signals-to-handle=SIGQUIT",  # the others are the worker's affair
        "-m", "sweeper.trainer.rank",
    ]  # fmt: skip


def start_others(
    endpoint: str,
    run_id: str,
    *,
    num_nodes: int,
    ranks_per_node: int,
    environment: Mapping[str, str] = os.environ,
) -> subprocess.Popen[bytes]:
    """Start the agents of all other nodes of this job. They die with the process that is returned, and it with us."""
    command = [
        "srun", "--overlap", f"--nodes={num_nodes - 1}", f"--ntasks={num_nodes - 1}", "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(environment)}", f"--exclude={environment['SLURMD_NODENAME']}",
        "--kill-on-bad-exit=1", "--unbuffered", "--input=none",
        sys.executable, "-m", "sweeper.trainer.nodes", endpoint, run_id, str(num_nodes), str(ranks_per_node),
        environment[processes.ATTEMPT_VARIABLE],
    ]  # fmt: skip
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=processes.bound_to(os.getpid()))


def _cpus(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_CPUS_PER_TASK") or "1"


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node, which is not the first."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from sweeper.trainer.ranks import SOCKET_VARIABLE, first_failure, kill_at_once

    endpoint, run_id, num_nodes, ranks_per_node, attempt = argv
    processes.ignore_signals()
    os.environ[processes.ATTEMPT_VARIABLE] = attempt
    ended_here = kill_at_once()
    with tempfile.TemporaryDirectory(prefix="sweeper-ranks-") as directory:
        os.environ[SOCKET_VARIABLE] = str(Path(directory, "rank0"))
        try:
            torchrun.main(
                torchrun_arguments(
                    endpoint, run_id, num_nodes=int(num_nodes), ranks_per_node=int(ranks_per_node),
                    address=f"{_LAST}{os.environ.get('SLURM_NODEID', '')}{here()}", is_host=False,
                )
            )  # fmt: skip
        except ChildFailedError as error:
            failure = first_failure(error, directory, ended_here)
            if not failure[1].get("is_others"):
                _failure_path(attempt).write_text(json.dumps(failure))
            return 1
    return 0


def _failure_path(attempt: str) -> Path:
    """Where the node whose rank failed first leaves what is to be told of it: nodes share the run directory."""
    run_dir, _, lease_epoch = attempt.rpartition(":")
    return Path(run_dir, rundir.LOGS_DIR, f"failure_{lease_epoch}.json")


def failure_of_others(others: subprocess.Popen[bytes], spec: Spec) -> tuple[int, Message] | None:
    """What another node has left to be told, once its agent is gone; None if nothing."""
    path = _failure_path(in_attempt(spec.run_dir, spec.lease_epoch))
    with contextlib.suppress(subprocess.TimeoutExpired):
        others.wait(OTHERS_WAIT_S)
    try:
        code, ending = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    path.unlink(missing_ok=True)
    return code, ending


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
