"""Which processes belong to a testbed, and the end of exactly those.

INVARIANT: a process belongs to a testbed if what it *is* says so: one of the daemons' programs at work below the
testbed's directory, one with the cluster's unique name in its environment (SLURM gives it to every job, and we to
every daemon), or a descendant of these. So there is no list of pids to be lost when `up` is killed half way or to
be out of date, and a shell that only has SLURM_CONF set is nobody's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A living process of a testbed."""

    pid: int
    name: str | None
    """The daemon's, or the node's for its slurmd; None for helpers of daemons, for steps and for jobs."""
    node: str | None
    """Where it runs, as far as SLURM is concerned; None for what belongs to no node."""


def find_processes(dir: Path, cluster: str) -> list[Process]:
    """Returns every living process of the testbed in `dir`, whose cluster has that name."""
    parents = {pid: parent for pid in _all_pids() if (parent := _parent(pid)) is not None}
    mine = {pid: process for pid in parents if (process := _recognise(pid, dir, cluster)) is not None}
    while heirs := [pid for pid, parent in parents.items() if parent in mine and pid not in mine]:
        mine |= {pid: Process(pid=pid, name=None, node=mine[parents[pid]].node) for pid in heirs}
    return list(mine.values())


def kill(find: Callable[[], list[Process]], *, timeout_s: float) -> None:
    """Kills what `find` finds until it finds nothing more: a daemon may start another process while it dies.

    Raises:
        TimeoutError: There are still some.
    """
    deadline = time.monotonic() + timeout_s
    while found := find():
        if time.monotonic() > deadline:
            raise TimeoutError(f"these do not end: {found}")
        with _held(found) as pidfds:
            # INVARIANT: what is found once more while it is held dies, never a new owner of its number.
            for pid in {process.pid for process in find()} & pidfds.keys():
                _send_kill(pidfds[pid])
        time.sleep(0.01)


@contextmanager
def _held(processes: list[Process]) -> Iterator[dict[int, int]]:
    """Yields pid → a descriptor that means that very process, for those that still live."""
    pidfds: dict[int, int] = {}
    try:
        for process in processes:
            try:
                pidfds[process.pid] = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
        yield pidfds
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)


def _send_kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return  # it is dead, as it should be


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int | None:
    """Returns the parent of a process; None if it is dead, or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def _recognise(pid: int, dir: Path, cluster: str) -> Process | None:
    """Returns what a process is to the testbed; None if by itself it is none of its daemons, steps or jobs."""
    proc = Path(f"/proc/{pid}")
    try:
        program = _link(proc / "exe").name.removesuffix(
            "-wlm"
        )  # Debian's slurmd is an alternative, slurmd-wlm
        folder = _link(proc / "cwd")
        title = (proc / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
        environment = (proc / "environ").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it is gone, or another user's
        return None
    if program in DAEMONS and folder.is_relative_to(dir):
        place = folder.relative_to(dir).parts
        node = place[1] if place[:1] == ("spool",) else None
        # A helper is the same program under a title of its own, like "slurmstepd: [1.batch]".
        return Process(pid=pid, name=(node or program) if title == program else None, node=node)
    if f"SLURM_CLUSTER_NAME={cluster}" in environment:
        variables = dict(entry.partition("=")[::2] for entry in environment)
        return Process(pid=pid, name=None, node=variables.get("SLURMD_NODENAME"))
    return None


def _link(path: Path) -> Path:
    return Path(os.readlink(path).removesuffix(" (deleted)"))
