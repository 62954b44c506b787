"""Ranks of one training on several nodes of a SLURM job: one torchrun agent a node.

The agent beside the worker is where the rendezvous is, and where rank 0 has to be, which holds the
channels to the worker. c10d numbers nodes by the order of their addresses' texts: the others give
one that comes behind every name, and is used for nothing else.

The other nodes are served by `python -m sweeper.trainer.nodes DIRECTORY`, which the batch script starts
there beside the worker, and which runs an agent for the order that lies in that directory. HAZARD: an
`srun` of the worker's own would end its ranks at once when SLURM warns of a preemption, because it
is in a step and gets the signal; what the batch script starts gets none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sweeper import fsops, processes, rundir
from sweeper.channel import Message
from sweeper.companion import DATABASE_SECRETS
from sweeper.errors import ConfigError
from sweeper.trainer.run import Spec, in_attempt

DIRECTORY_VARIABLE = "SWEEPER_NODES_DIR"
ORDER_FILE = "order.json"
POLL_S = 0.1
OTHERS_WAIT_S = 10.0
_LAST = "~"
"""Sorts behind letters, digits and dots."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the other nodes are to run, until it is gone.

    Attributes:
        endpoint: Where the rendezvous is.
        run_id: The rendezvous's name, never used twice.
        attempt: Of which run, as `in_attempt` has it.
        log: The attempt's log; what the ranks print goes beside it, one file a node.
    """

    endpoint: str
    run_id: str
    num_nodes: int
    ranks_per_node: int
    attempt: str
    log: str


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


# --- the worker's side -----------------------------------------------------------------------


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError unless this job's script has started what serves the other nodes."""
    if not environment.get(DIRECTORY_VARIABLE):
        raise ConfigError(
            "a training on several nodes needs a job whose script starts `python -m sweeper.trainer.nodes` on the others",
            why=f"${DIRECTORY_VARIABLE} is not set",
            do="Launch with launcher=slurm, or take the lines about it from slurm/worker.sbatch.",
        )


def _directory(environment: Mapping[str, str] = os.environ) -> Path:
    directory = Path(environment[DIRECTORY_VARIABLE])
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def order(order: Order) -> None:
    """Have the other nodes run this, and nothing else any more."""
    fsops.replace(_directory() / ORDER_FILE, json.dumps(asdict(order)).encode())


def withdraw() -> None:
    """Have the other nodes end what they run."""
    (_directory() / ORDER_FILE).unlink(missing_ok=True)


def failure_of_others(spec: Spec) -> tuple[int, Message] | None:
    """What another node has left to be told, waited for; None if it left nothing."""
    path = _failure_path(in_attempt(spec.run_dir, spec.lease_epoch))
    deadline = time.monotonic() + OTHERS_WAIT_S
    # HAZARD: over NFS a name that was not there is remembered as absent; a listing asks the server.
    while path.name not in os.listdir(path.parent) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    try:
        code, ending = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    path.unlink(missing_ok=True)
    return code, ending


def _failure_path(attempt: str) -> Path:
    """Where the node whose rank failed first leaves what is to be told of it: nodes share the run directory."""
    run_dir, _, lease_epoch = attempt.rpartition(":")
    return Path(run_dir, rundir.LOGS_DIR, f"failure_{lease_epoch}.json")


# --- the other nodes' side -------------------------------------------------------------------


def serve(directory: Path) -> int:
    """Run an agent for each order, until the directory is gone. Signals end it in no case but SIGKILL."""
    processes.ignore_signals()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    current: Order | None = None
    agent: subprocess.Popen[bytes] | None = None
    while True:
        found = _read(directory)
        if found != current:
            if agent is not None:
                _end(agent)
            agent = _start(found) if found is not None else None
            current = found
        if found is None and not directory.exists():
            return 0
        if agent is not None:
            agent.poll()
        time.sleep(POLL_S)


def _read(directory: Path) -> Order | None:
    try:
        if ORDER_FILE not in os.listdir(directory):
            return None
        return Order(**json.loads((directory / ORDER_FILE).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _start(order: Order) -> subprocess.Popen[bytes]:
    path = Path(order.log)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    environment = {name: value for name, value in os.environ.items() if name not in DATABASE_SECRETS}
    with open(path.with_name(f"{node}.{path.name}"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "sweeper.trainer.nodes", "--agent", json.dumps(asdict(order))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=processes.bound_to(os.getpid()),
            env={**environment, processes.ATTEMPT_VARIABLE: order.attempt},
        )


def _end(agent: subprocess.Popen[bytes]) -> None:
    """Its ranks die with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def run_agent(order: Order) -> int:
    """Run the ranks of this node, which is not the first."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from sweeper.trainer.ranks import SOCKET_VARIABLE, first_failure, kill_at_once

    processes.ignore_signals()
    ended_here = kill_at_once()
    with tempfile.TemporaryDirectory(prefix="sweeper-ranks-") as directory:
        os.environ[SOCKET_VARIABLE] = str(Path(directory, "rank0"))
        try:
            torchrun.main(
                torchrun_arguments(
                    order.endpoint, order.run_id, num_nodes=order.num_nodes, ranks_per_node=order.ranks_per_node,
                    address=f"{_LAST}{os.environ.get('SLURM_NODEID', '')}{here()}", is_host=False,
                )
            )  # fmt: skip
        except ChildFailedError as error:
            failure = first_failure(error, directory, ended_here)
            if not failure[1].get("is_others"):
                fsops.replace(_failure_path(order.attempt), json.dumps(failure).encode())
            return 1
    return 0


def main(argv: Sequence[str]) -> int:
    """`DIRECTORY` serves a node; `--agent ORDER` is what that starts."""
    if argv[0] == "--agent":
        return run_agent(Order(**json.loads(argv[1])))
    return serve(Path(argv[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
