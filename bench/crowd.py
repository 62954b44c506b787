"""Many processes that do the same small thing at once, each act timed. Standard library only."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

Act = Callable[[], None]
"""One ask + tell."""


def crowd(*, workers: int, acts: int, limit_s: float, connect: Callable[[], Act]) -> dict[str, Any]:
    """Let `workers` forked processes do `acts` acts in all, or as many as `limit_s` allows.

    Each process connects and does one act unmeasured, so that no import or first connection is timed.

    Returns:
        rate_per_s (acts by wall time of all), p50_s and p99_s of single acts, acts.
    """
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers)
    queue: Any = context.SimpleQueue()
    each = max(1, acts // workers)
    arguments = (connect, barrier, queue, each, limit_s)
    processes = [context.Process(target=_member, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return _summary(results)


def _member(connect: Callable[[], Act], barrier: Any, queue: Any, each: int, limit_s: float) -> None:
    seconds: list[float] = []
    start = now = 0.0
    error = ""
    try:
        act = connect()
        act()
        barrier.wait(120)
        start = now = time.monotonic()
        while len(seconds) < each and now - start < limit_s:
            act()
            before, now = now, time.monotonic()
            seconds.append(now - before)
    except Exception as raised:  # noqa: BLE001 - whatever it is, the table says it
        error = f"{type(raised).__name__}: {raised}"[:200]
        barrier.abort()
    queue.put((start, now, seconds, error))


def _summary(results: list[tuple[float, float, list[float], str]]) -> dict[str, Any]:
    errors = [error for *_, error in results if error and "BrokenBarrier" not in error]
    if errors:
        return {"error": f"{len(errors)} of {len(results)} workers: {errors[0]}"}
    seconds = sorted(second for result in results for second in result[2])
    wall_s = max(result[1] for result in results) - min(result[0] for result in results)
    return {
        "rate_per_s": len(seconds) / wall_s,
        "p50_s": seconds[len(seconds) // 2],
        "p99_s": seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))],
        "acts": len(seconds),
    }


def answer(value: dict[str, Any]) -> None:
    """Print the one JSON line that a measured script ends with."""
    print(json.dumps(value), flush=True)
