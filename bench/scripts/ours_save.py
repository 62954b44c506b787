"""Ours: what a save of a large state takes in all, what loading it takes, and how fast training goes meanwhile.

Usage: ours_save.py DIRECTORY SIZE_MB REPEATS
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from bench import workload
from bench.crowd import answer
from sweeper.torch import Loop, open_run, resumable


def opened(directory: Path, size_mb: int) -> tuple[Loop, torch.nn.Module, torch.optim.Optimizer]:
    """A run with a large state, restored from a cold page cache if there is one."""
    model, optimizer = workload.large(size_mb)
    run = open_run(directory, every_s=None, keep_last=2)
    forget_pages(directory)  # just before they are read, as the plain read does
    started = time.monotonic()
    loop = resumable(
        run, model=model, optimizer=optimizer, loader=DataLoader(TensorDataset(torch.zeros(100_000, 1)))
    )
    loaded_s.append(time.monotonic() - started)
    return loop, model, optimizer


def save(directory: Path, size_mb: int, repeats: int) -> dict[str, object]:
    """Save `repeats` times beside real steps; count the steps that fit into a save, and beside it."""
    loop, model, optimizer = opened(directory, size_mb)
    totals: list[float] = []
    blocked: list[float] = []
    idle_s: list[float] = []
    busy_s: list[float] = []
    was_busy = False
    began = time.monotonic()
    for _ in loop.batches(epochs=1):
        if was_busy and not loop.is_saving:
            totals.append(loop.saves.took_s)
            blocked.append(loop.saves.blocked_s)
            if len(totals) > repeats:
                break
        was_busy = loop.is_saving
        if not was_busy and time.monotonic() - began > 1.0:
            loop.save()
            began = time.monotonic()
        started = time.monotonic()
        workload.large_step(model, optimizer)
        (busy_s if was_busy else idle_s).append(time.monotonic() - started)
    return {
        "total_s": totals[1:],
        "blocked_s": blocked[1:],
        "speed": sorted(idle_s)[len(idle_s) // 2] / (sum(busy_s) / len(busy_s)),
    }


def forget_pages(directory: Path) -> None:
    """Drop what the page cache holds of the checkpoints."""
    for path in directory.rglob("*.p*t*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def load(directory: Path, size_mb: int) -> float:
    """Seconds to verify and restore, from a cold page cache."""
    opened(directory, size_mb)
    return loaded_s[-1]


loaded_s: list[float] = []

if __name__ == "__main__":
    place, megabytes = Path(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3] == "load":
        answer({"load_s": load(place, megabytes)})
    else:
        answer(save(place, megabytes, int(sys.argv[3])))
