"""What failures cost a run or a sweep, and what resuming saved: one text of SQL each, for all who ask.

Imports nothing heavy: listings use it as well as the worker, which tells W&B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

Row = Mapping[str, Any]


class Steps(TypedDict):
    """What failures cost, in optimizer updates.

    `trained` were executed, `lost` of them twice or for nothing, `recovered` did not have to
    be because a checkpoint held them. `goodput` is the share of `trained` that counts.
    """

    trained: int
    recovered: int
    lost: int
    goodput: float | None


class Resumption(TypedDict):
    """How resuming went.

    Attributes:
        tried: Attempts that took over an incomplete run, and are over or training.
        succeeded: Of those, how many trained on.
        failed: How many ended before that by a crash, a kill, or for want of a good checkpoint.
        fallbacks: Runs that were given up for a fresh one.
        success_rate, failure_rate, fallback_rate: Shares of `tried`; None when it is 0.
        latency_s: Mean time from the claim to where training goes on.
        seconds_saved: Training time that checkpoints saved, at the pace of each run.
        gpu_seconds_saved: The same times the GPUs of each run.
    """

    tried: int
    succeeded: int
    failed: int
    fallbacks: int
    success_rate: float | None
    failure_rate: float | None
    fallback_rate: float | None
    latency_s: float | None
    seconds_saved: float
    gpu_seconds_saved: float


# An attempt that is over ended where it says; where the run is now, only the one that still trains.
_END = """CASE WHEN r.state = 'running' AND a.attempt = r.attempts AND r.global_step > COALESCE(a.end_step, -1)
         THEN r.global_step ELSE a.end_step END"""

# An attempt's steps beyond the start of the next one were trained again; a superseded run was
# trained for nothing. Attempts whose trainer never said where it starts trained nothing.
_ATTEMPTS = f"""
  SELECT a.run_id, a.attempt, a.start_step, a.outcome, a.ended_at, r.state, a.num_gpus,
    a.went_on_at - a.started_at AS latency_s, a.ended_at - a.went_on_at AS training_s,
    CASE WHEN {_END} > a.start_step THEN {_END} - a.start_step ELSE 0 END AS trained,
    LEAD(a.start_step) OVER (PARTITION BY a.run_id ORDER BY a.attempt) AS next_start
  FROM sweeper_attempt a JOIN sweeper_run r ON r.run_id = a.run_id
"""

_STEPS = """
SELECT COALESCE(SUM(trained), 0) AS trained,
  COALESCE(SUM(CASE WHEN attempt > 1 THEN start_step ELSE 0 END), 0) AS recovered,
  COALESCE(SUM(CASE WHEN state = 'superseded' THEN trained
                    WHEN start_step + trained > next_start THEN start_step + trained - next_start
                    ELSE 0 END), 0) AS lost
FROM ({attempts} WHERE {where} AND a.start_step IS NOT NULL) AS attempts
"""

_RESUMPTION = """
SELECT COALESCE(SUM(succeeded), 0) AS succeeded, COALESCE(SUM(failed), 0) AS failed,
  COALESCE(SUM(is_superseded), 0) AS fallbacks,
  SUM(latency_s) AS latency_s, COALESCE(SUM(num_timed), 0) AS num_timed,
  SUM(CASE WHEN trained > 0 THEN recovered * training_s / trained END) AS seconds_saved,
  SUM(CASE WHEN trained > 0 THEN recovered * training_s / trained * num_gpus END) AS gpu_seconds_saved
FROM (
  SELECT SUM(CASE WHEN attempt > 1 AND start_step IS NOT NULL THEN 1 ELSE 0 END) AS succeeded,
    SUM(CASE WHEN attempt > 1 AND start_step IS NULL AND outcome IN ('crashed', 'oom', 'lost', 'timeout')
        THEN 1 ELSE 0 END) AS failed,
    MAX(CASE WHEN state = 'superseded' THEN 1 ELSE 0 END) AS is_superseded,
    SUM(CASE WHEN attempt > 1 THEN latency_s END) AS latency_s,
    SUM(CASE WHEN attempt > 1 AND latency_s IS NOT NULL THEN 1 ELSE 0 END) AS num_timed,
    SUM(CASE WHEN attempt > 1 THEN COALESCE(start_step, 0) ELSE 0 END) AS recovered,
    SUM(training_s) AS training_s,
    SUM(CASE WHEN training_s IS NOT NULL THEN trained ELSE 0 END) AS trained,
    COALESCE(MAX(num_gpus), 0) AS num_gpus
  FROM ({attempts} WHERE {where}) AS attempts GROUP BY run_id
) AS runs
"""


def steps_of(query: Callable[[str], Row], where: str) -> Steps:
    """Ask for the steps of a sweep or a run.

    Args:
        query: Runs one text of SQL with `:id` bound and returns its only row.
        where: A condition on `sweeper_run r`.
    """
    row = query(_STEPS.format(attempts=_ATTEMPTS, where=where))
    trained, lost = int(row["trained"]), int(row["lost"])
    return {
        "trained": trained,
        "recovered": int(row["recovered"]),
        "lost": lost,
        "goodput": (trained - lost) / trained if trained else None,
    }


def resumption_of(query: Callable[[str], Row], where: str) -> Resumption:
    """Ask how resuming went; arguments as of `steps_of`."""
    row = query(_RESUMPTION.format(attempts=_ATTEMPTS, where=where))
    succeeded, failed, fallbacks = (int(row[name]) for name in ("succeeded", "failed", "fallbacks"))
    tried = succeeded + failed

    def share(count: int) -> float | None:
        return count / tried if tried else None

    return {
        "tried": tried,
        "succeeded": succeeded,
        "failed": failed,
        "fallbacks": fallbacks,
        "success_rate": share(succeeded),
        "failure_rate": share(failed),
        "fallback_rate": share(fallbacks),
        "latency_s": float(row["latency_s"]) / int(row["num_timed"]) if row["num_timed"] else None,
        "seconds_saved": float(row["seconds_saved"] or 0.0),
        "gpu_seconds_saved": float(row["gpu_seconds_saved"] or 0.0),
    }


def figures(
    attempts: int, causes: Sequence[str], of_run: tuple[Steps, Resumption], of_sweep: Resumption
) -> dict[str, Any]:
    """What W&B's summary says of a run's failures and how it was resumed, and of its sweep's so far."""
    steps, resumption = of_run
    found = {
        "attempts": attempts, "causes": ", ".join(causes), "steps_recovered": steps["recovered"],
        "steps_lost": steps["lost"], "goodput": steps["goodput"], "resume_latency_s": resumption["latency_s"],
        "sweep_success_rate": of_sweep["success_rate"], "sweep_failure_rate": of_sweep["failure_rate"],
        "sweep_fallback_rate": of_sweep["fallback_rate"], "sweep_gpu_seconds_saved": of_sweep["gpu_seconds_saved"],
    }  # fmt: skip
    return {f"sweeper/{key}": value for key, value in found.items() if value is not None}


def nothing() -> tuple[Steps, Resumption]:
    """What is told of directories that no database knows."""
    none = {
        "trained": 0, "recovered": 0, "lost": 0, "succeeded": 0, "failed": 0, "fallbacks": 0,
        "latency_s": None, "num_timed": 0, "seconds_saved": 0.0, "gpu_seconds_saved": 0.0,
    }  # fmt: skip
    return steps_of(lambda sql: none, ""), resumption_of(lambda sql: none, "")
