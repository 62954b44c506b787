"""Who a process is, and how to end what is left of it. Whether it lives: `sweeper.alive`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sweeper.alive import boot_id, machine_id, pid_namespace, proof_of_death, start_ticks
from sweeper.records import ProcessId

__all__ = [
    "ATTEMPT_VARIABLE",
    "adopt_orphans",
    "boot_id",
    "bound_to",
    "children",
    "die_with_parent",
    "ending_of",
    "has_ended",
    "identify",
    "ignore_signals",
    "kill_group",
    "kill_leftovers",
    "machine_id",
    "outlive_parent",
    "pid_namespace",
    "proof_of_death",
    "signals_held",
    "start_ticks",
]

ATTEMPT_VARIABLE = "SWEEPER_ATTEMPT"
"""Environment variable `<run directory>:<lease_epoch>` that programs started by a trainer inherit."""

NOT_FOR_CHILDREN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What SLURM, or a terminal, sends to all processes of a job: who is in charge of it acts, the others
end when they are told, or with their parent."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def identify(pid: int | None = None) -> ProcessId:
    """The identity of `pid` (default: this process), which must be alive."""
    pid = pid or os.getpid()
    return ProcessId(
        host=socket.gethostname(),
        machine_id=machine_id(),
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
        uid=os.getuid(),
        pid=pid,
        start_ticks=start_ticks(pid) or 0,
        slurm_job_id=os.environ.get("SLURM_JOB_ID", ""),
        slurm_cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        slurm_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def kill_leftovers(
    processes: Iterable[ProcessId],
    *,
    attempt_tag: str,
    wait_s: float = 5.0,
    among: Iterable[int] | None = None,
) -> list[int]:
    """End with SIGKILL what is left of an attempt on this machine, and wait until it is gone.

    Ended are the recorded processes that are still themselves, all members of their sessions,
    and every process that inherited `attempt_tag` in its environment.

    Args:
        processes: As recorded for the attempt.
        attempt_tag: `<run directory>:<lease_epoch>`.
        wait_s: How long to wait for them to be gone.
        among: Look only at these pids for members and heirs; the default is all there are.

    Returns:
        The pids that were ended.
    """
    here, namespace, me = boot_id(), pid_namespace(), os.getpid()
    ours = [p for p in processes if (p.boot_id, p.pid_namespace) == (here, namespace) and p.pid != me]
    alive = {p.pid for p in ours if start_ticks(p.pid) == p.start_ticks}
    # A session's number is not given to another process while the session has members.
    sessions = {p.pid for p in ours if p.pid in alive or start_ticks(p.pid) is None} - {os.getsid(0)}
    for pid in _all_pids() if among is None else among:
        if pid != me and (_session(pid) in sessions or _has_tag(pid, attempt_tag)):
            alive.add(pid)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + wait_s
    while any(start_ticks(pid) is not None for pid in alive) and time.monotonic() < deadline:
        time.sleep(0.005)
    return sorted(alive)


def children() -> list[int]:
    """The children of this process, orphans it adopted included; all pids where it cannot be told."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return _all_pids()


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _has_tag(pid: int, tag: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{ATTEMPT_VARIABLE}={tag}".encode() in environment.split(b"\0")


def die_with_parent(parent_pid: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent ends; end now if it already has.

    HAZARD: the signal comes when the *thread* that created this process ends, so create
    processes from the main thread. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    _prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent_pid:
        os._exit(1)


def ignore_signals() -> None:
    """Leave the signals that everybody gets to whoever is in charge; also those that `signals_held` kept back."""
    for number in NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_CHILDREN)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Start children that will `ignore_signals`: one that comes before that waits, instead of ending them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def bound_to(parent_pid: int, *, niceness: int = 0) -> Callable[[], None]:
    """What a child does before it becomes somebody else's program: Popen's `preexec_fn`.

    It dies with its parent, and gets the signals that its parent may ignore.

    HAZARD: called between fork and exec, so the parent must have one thread only, the main one.
    """

    def prepare() -> None:
        for number in NOT_FOR_CHILDREN:
            signal.signal(number, signal.SIG_DFL)
        os.nice(niceness)
        die_with_parent(parent_pid)

    return prepare


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child is over. It stays unreaped, so that its number remains its own."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_group(process: subprocess.Popen[bytes]) -> int:
    """End a child that leads a process group, and all of its group; returns its return code."""
    if process.returncode is None:  # reaped, its number may be somebody else's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def ending_of(returncode: int) -> str:
    """How a process ended, in words: `exit code 3`, `SIGKILL`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-returncode, f"signal {-returncode}")


def outlive_parent() -> None:
    """Take `die_with_parent` back: from now on this process sees to its end itself."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants. Source: prctl(2), PR_SET_CHILD_SUBREAPER."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
