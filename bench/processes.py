"""Start measured processes, bounded in time, and leave none behind.

The bench makes itself a child subreaper: whatever a measured program starts, daemons included,
stays a descendant of the bench and is found again through /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""Source: prctl(2)."""

ROOT = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A measured program did not do what it should; the text says why, for the table."""


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every measured program: one thread, no network services, our modules found."""
    fixed = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return {**os.environ, **fixed, **(extra or {})}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory on a real disk that is gone afterwards, whatever was running in it."""
    path = Path(tempfile.mkdtemp(prefix="sb-"))
    try:
        yield path
    finally:
        kill_all()
        shutil.rmtree(path, ignore_errors=True)


def start(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; its output goes to the end of `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(env),
            cwd=ROOT,
            start_new_session=True,
        )


def run(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, ok: Sequence[int] = (0,)
) -> str:
    """Run a program to its end and return its stdout; everything it started is killed afterwards.

    Raises:
        Failed: It took longer than `timeout_s`, or its exit code is not in `ok`.
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(env),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no end within {timeout_s:.0f} s") from error
    finally:
        kill_all()
    if process.returncode not in ok:
        raise Failed(f"exit code {process.returncode}: {last_line(err) or last_line(out)}")
    return out.decode(errors="replace")


def last_line(data: bytes) -> str:
    """The last line that says something, shortened: the reason, in most programs."""
    lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("WARNING")]
    return (telling or lines or [""])[-1][:160]


def descendants(of: int | None = None) -> list[int]:
    """Pids of all living processes below `of` (default: the bench), parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _living_parent(int(entry))):
            children.setdefault(parent, []).append(int(entry))
    found = list(children.get(of or os.getpid(), []))
    for pid in found:  # grows while it is read
        found.extend(children.get(pid, []))
    return found


def _living_parent(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[1])


def kill(pid: int) -> None:
    """SIGKILL one process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_all(*, patience_s: float = 10.0) -> None:
    """SIGKILL every descendant of the bench until none is left."""
    deadline = time.monotonic() + patience_s
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            kill(pid)
        time.sleep(0.01)
        reap()
    reap()


def reap() -> None:
    """Collect adopted orphans that ended. Children with a Popen of their own notice by ECHILD."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
