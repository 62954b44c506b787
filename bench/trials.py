"""Rows 1 and 2: what a trial costs beyond its training, and when the first one starts."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

from bench import processes, trace
from bench.contenders import Contender
from bench.processes import Failed
from bench.table import Cell, Missing, Series

WORKERS = 2
WINDOWS = 5


def cost_ms(contender: Contender, *, trials: int, training_s: float, timeout_s: float) -> Cell:
    """Wall time per trial with two workers in steady state, minus half of a training, in windows.

    The first two trials of each worker are the start and belong to row 2.
    """
    try:
        with processes.scratch() as directory:
            path = directory / "trace"
            processes.run(
                contender.argv(directory),
                timeout_s=timeout_s,
                env={**contender.env, "BENCH_TRACE": str(path)},
            )
            ends = [event.at_s for event in trace.read(path) if event.name == "end"]
    except Failed as error:
        return Missing(str(error))
    if len(ends) < trials:
        return Missing(f"only {len(ends)} of {trials} trials ended")
    return Series(tuple(1e3 * (pace_s - training_s / WORKERS) for pace_s in paces(ends[2 * WORKERS - 1 :])))


def paces(ends: list[float]) -> list[float]:
    """Seconds per trial in up to WINDOWS windows of equal size; trials of some peers end in pairs or fours."""
    size = max(2 * WORKERS, (len(ends) - 1) // WINDOWS // WORKERS * WORKERS)
    marks = ends[::size]
    return [(after - before) / size for before, after in pairwise(marks)]


def first_start_s(contender: Contender, *, repeats: int, timeout_s: float) -> Cell:
    """Seconds from the command to the first line of the training function, torch imported."""
    try:
        return Series(tuple(_first_start(contender, timeout_s=timeout_s) for _ in range(repeats)))
    except Failed as error:
        return Missing(str(error))


def _first_start(contender: Contender, *, timeout_s: float) -> float:
    with processes.scratch() as directory:
        path, log = directory / "trace", directory / "log"
        started_s = time.monotonic()
        process = processes.start(
            contender.argv(directory), log=log, env={**contender.env, "BENCH_TRACE": str(path)}
        )
        first = trace.wait_for(path, lambda _: True, timeout_s=timeout_s, process=process, log=log)
        return first.at_s - started_s


def training_s(path: Path) -> float:
    """Median seconds from start to end of the trainings in a trace of one process."""
    events = trace.read(path)
    starts = [event.at_s for event in events if event.name == "start"]
    ends = [event.at_s for event in events if event.name == "end"]
    return Series(
        tuple(end - start for start, end in zip(starts, ends, strict=True))[len(ends) // 2 :]
    ).median
