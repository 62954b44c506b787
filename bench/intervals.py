"""Row 10: the interval that `checkpoint.interval=auto` finds, beside the best fixed one.

Months of training cannot be waited for: what a save and a restart cost is measured, and the failures
are drawn, the same ones for every interval.
"""

from __future__ import annotations

import random

from sweeper.torch.cadence import SLOWDOWN, Cadence

FAILURES = 2_000
STEPS_APART = 1.1
"""Ratio of two fixed intervals that are tried."""


def goodput(interval_s: float, *, cost_s: float, restart_s: float, failures_s: list[float]) -> float:
    """Share of wall time that counts, for saves that cost `cost_s` each `interval_s` seconds of training."""
    useful = 0.0
    cycle_s = interval_s + cost_s
    for life_s in failures_s:
        left_s = max(0.0, life_s - restart_s)
        useful += int(left_s / cycle_s) * interval_s
    return useful / sum(failures_s)


def compare(
    *, mtbf_s: float, blocked_s: float, took_s: float, restart_s: float
) -> tuple[float, float, float, float]:
    """(auto's goodput, its interval in seconds, the best fixed interval's goodput, that interval)."""
    random_ = random.Random(0)
    failures_s = [random_.expovariate(1 / mtbf_s) for _ in range(FAILURES)]
    cost_s = blocked_s + SLOWDOWN * (took_s - blocked_s)

    def of(interval_s: float) -> float:
        return goodput(interval_s, cost_s=cost_s, restart_s=restart_s, failures_s=failures_s)

    auto_s = Cadence(is_auto=True, mtbf_s=mtbf_s).interval_s(blocked_s=blocked_s, took_s=took_s)
    assert auto_s is not None
    fixed = [took_s * STEPS_APART**power for power in range(120)]
    best_s = max((interval_s for interval_s in fixed if interval_s < 4 * mtbf_s), key=of)
    return of(auto_s), auto_s, of(best_s), best_s
