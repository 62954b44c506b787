"""Floor of a restart: a child killed → fork with torch loaded, build, load the checkpoint, one step.

Also tells what a load and a durable save take without a fork.
Usage: floor_restart.py DIRECTORY REPEATS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  (the first optimizer would import it in each child)

from bench import workload
from bench.crowd import answer


def train(path: Path, pipe: int) -> None:
    """Build, load, one step; say when; then wait to be killed."""
    model = workload.network()
    optimizer = workload.optimizer_of(model)
    workload.load(path, model=model, optimizer=optimizer)
    workload.step(model, optimizer, next(workload.batches()))
    os.write(pipe, f"{time.monotonic():.6f}\n".encode())
    signal.pause()


def start(path: Path) -> tuple[int, float]:
    """Fork a trainer; returns its pid and the time of its first step."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        train(path, writer)
    os.close(writer)
    stepped_at = float(os.read(reader, 64))
    os.close(reader)
    return pid, stepped_at


def restart(path: Path) -> float:
    """Seconds from the kill of one trainer to the first step of the next."""
    pid, _ = start(path)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pid, stepped_at = start(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return stepped_at - killed_at


def save(path: Path) -> float:
    """Seconds of one durable save."""
    model = workload.network()
    optimizer = workload.optimizer_of(model)
    workload.step(model, optimizer, next(workload.batches()))
    started = time.monotonic()
    workload.save(path, step=1, model=model, optimizer=optimizer)
    return time.monotonic() - started


if __name__ == "__main__":
    checkpoint = Path(sys.argv[1]) / "plain.pt"
    repeats = int(sys.argv[2])
    saves = [save(checkpoint) for _ in range(repeats)]
    answer({"restart_s": [restart(checkpoint) for _ in range(repeats)], "save_s": saves})
