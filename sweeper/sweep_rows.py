"""Rows of our own tables (sweeps, runs, attempts, verdicts): written, counted, and made into records.

Here is what more than one transaction of the store needs; what one alone needs is in its method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from sqlalchemy.engine import Connection, Row

from sweeper import clock, optuna_rows
from sweeper.database import execute, insert
from sweeper.records import Ending, Lease, NewSweep, ParamValue, ProcessId, Run, Suspect, Sweep
from sweeper.states import Outcome, State

BUDGETS = {Outcome.LOST: "lost_count", Outcome.CRASHED: "crashed_count", Outcome.OOM: "oom_count"}
"""Outcome that costs something → column that counts it."""


def quoted(states: Iterable[State]) -> str:
    """States as the inside of an SQL list."""
    return ", ".join(f"'{state}'" for state in sorted(states))


_COUNTED = quoted(set(State) - {State.SUPERSEDED, State.CANCELLED})


# --- sweeps --------------------------------------------------------------------------------


def insert_sweep(connection: Connection, new: NewSweep) -> tuple[int, int]:
    """Sweep, study and grid; returns the ids of the first two."""
    study_id = optuna_rows.insert_study(connection, new.name, new.direction)
    sweep_id = execute(
        connection,
        "INSERT INTO sweeper_sweep (name, study_id, seed, n_trials, metric, direction, config, created_at, is_cancelled) "
        "VALUES (:name, :study, :seed, :n, :metric, :direction, :config, :now, :false) RETURNING sweep_id",
        name=new.name, study=study_id, seed=new.seed, n=new.n_trials, metric=new.metric,
        direction=new.direction, config=json.dumps(new.config), now=clock.wall_s(), false=False,
    ).scalar_one()  # fmt: skip
    for number, point in enumerate(new.grid):
        optuna_rows.insert_trial(connection, study_id, number, "WAITING", point)
    return int(sweep_id), study_id


def count_left(connection: Connection, sweep_id: int) -> int:
    """How many trials of the sweep may still be drawn."""
    left = execute(
        connection,
        "SELECT CASE WHEN is_cancelled THEN 0 ELSE n_trials - "
        f"(SELECT count(*) FROM sweeper_run WHERE sweep_id=:s AND state IN ({_COUNTED}) AND is_retried=:f) END "
        "FROM sweeper_sweep WHERE sweep_id=:s",
        s=sweep_id, f=False,
    ).scalar_one()  # fmt: skip
    return max(0, int(left))


def is_full(connection: Connection, sweep_id: int) -> bool:
    """Whether all trials of the sweep are drawn, cancelled or not."""
    left = execute(
        connection,
        f"SELECT n_trials - (SELECT count(*) FROM sweeper_run WHERE sweep_id=:s AND state IN ({_COUNTED}) "
        "AND is_retried=:f) FROM sweeper_sweep WHERE sweep_id=:s",
        s=sweep_id, f=False,
    ).scalar_one()  # fmt: skip
    return int(left) <= 0


def reserve_number(connection: Connection, sweep_id: int) -> int:
    """A run number nobody else gets."""
    after = execute(
        connection,
        "UPDATE sweeper_sweep SET next_run=next_run+1 WHERE sweep_id=:s RETURNING next_run",
        s=sweep_id,
    ).scalar_one()
    return int(after) - 1


# --- runs and attempts ---------------------------------------------------------------------


def insert_run(
    connection: Connection, run: Run, lease: Lease, *, owner: ProcessId, worker: str, now: float, until: float
) -> None:
    """A run is born running, under its first lease."""
    insert(
        connection, "sweeper_run",
        run_id=run.run_id, sweep_id=run.sweep_id, number=run.number, trial_id=run.trial_id, trial=run.trial, params=json.dumps(run.params),
        seed=run.seed, threads=run.threads, path=run.path, wandb_run_id=run.wandb_run_id, state=str(State.RUNNING),
        lease_epoch=lease.lease_epoch, owner_token=lease.owner_token, owner=dump_process(owner), worker=worker,
        heartbeat=1, lease_until=until, attempts=1,
        lost_count=run.lost_count, crashed_count=run.crashed_count, oom_count=run.oom_count,
        replaces=run.replaces, retry_of=run.retry_of, created_at=now, updated_at=now,
    )  # fmt: skip


def insert_attempt(
    connection: Connection, run_id: str, attempt: int, epoch: int, owner: ProcessId, now: float
) -> None:
    """An attempt begins; `end_attempt` says how it ended."""
    insert(
        connection, "sweeper_attempt",
        run_id=run_id, attempt=attempt, lease_epoch=epoch, owner=dump_process(owner), started_at=now,
    )  # fmt: skip


def end_attempt(connection: Connection, run_id: str, epoch: int, ending: Ending, *, now: float) -> int:
    """Write why the attempt ended, and count it against the budget of its class; returns the trial's id.

    It ended at the step last heard of, or further on if `Store.record_end` knew better.
    """
    committed = execute(
        connection,
        "UPDATE sweeper_attempt SET ended_at=:now, outcome=:o, reason=:why, detail=:detail, "
        "end_step=(SELECT CASE WHEN sweeper_attempt.end_step > r.global_step THEN sweeper_attempt.end_step "
        "ELSE r.global_step END FROM sweeper_run r WHERE r.run_id=:r) "
        "WHERE run_id=:r AND lease_epoch=:e AND outcome IS NULL RETURNING checkpoint_step",
        now=now, o=str(ending.outcome), why=ending.reason, detail=ending.detail, r=run_id, e=epoch,
    ).scalar_one_or_none()  # fmt: skip
    column = None if ending.is_disk_fault else BUDGETS.get(ending.outcome)
    count = f", {column}={column}+1" if column and committed is None else ""
    trial_id: int = execute(
        connection,
        f"UPDATE sweeper_run SET outcome=:o, reason=:why{count} WHERE run_id=:r RETURNING trial_id",
        o=str(ending.outcome), why=ending.reason, r=run_id,
    ).scalar_one()  # fmt: skip
    return trial_id


def insert_verdict(connection: Connection, trial_id: int, *, step: int, value: float, prune: bool) -> None:
    """What a report of this step was answered; the first answer stays."""
    execute(
        connection,
        "INSERT INTO sweeper_verdict (trial_id, step, value, prune) VALUES (:t, :s, :v, :p) ON CONFLICT (trial_id, step) DO NOTHING",
        t=trial_id, s=step, v=finite(value), p=prune,
    )  # fmt: skip


# --- rows and values -----------------------------------------------------------------------


def sweep_of(row: Row[Any]) -> Sweep:
    """A row of sweeper_sweep as its record."""
    return Sweep(
        row.sweep_id, row.name, row.study_id, row.seed, row.n_trials, row.metric, row.direction,
        json.loads(row.config), bool(row.is_cancelled),
    )  # fmt: skip


def run_of(row: Row[Any]) -> Run:
    """A row of sweeper_run as its record."""
    params: dict[str, ParamValue] = json.loads(row.params)
    return Run(
        run_id=row.run_id, sweep_id=row.sweep_id, number=row.number, trial_id=row.trial_id, trial=row.trial,
        params=params, seed=row.seed, threads=row.threads, path=row.path, wandb_run_id=row.wandb_run_id,
        state=State(row.state), lease_epoch=row.lease_epoch, attempts=row.attempts, global_step=row.global_step,
        total_steps=row.total_steps, checkpoint_step=row.checkpoint_step, lost_count=row.lost_count,
        crashed_count=row.crashed_count, oom_count=row.oom_count, replaces=row.replaces, retry_of=row.retry_of,
    )  # fmt: skip


def suspect_of(row: Row[Any]) -> Suspect:
    """A row of sweeper_run as an observer sees it."""
    return Suspect(
        row.run_id, row.lease_epoch, row.heartbeat, row.lease_until, row.lost_count,
        ProcessId(**json.loads(row.owner)), tuple(ProcessId(**data) for data in json.loads(row.processes or "[]")),
    )  # fmt: skip


@lru_cache(maxsize=100)
def dump_process(process: ProcessId) -> str:
    """JSON of a process, for `owner` columns."""
    return json.dumps(asdict(process))


def finite(value: float | None) -> float | None:
    """What a `value` column holds: no NaN, no infinity."""
    return value if value is not None and math.isfinite(value) else None
