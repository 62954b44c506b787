"""A sweep read back from run directories, and how it is written into a database."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from sqlalchemy.engine import Connection

from sweeper import optuna_rows, sweep_rows
from sweeper.database import execute, insert
from sweeper.records import NewSweep, Proposal, Run
from sweeper.states import Outcome, State


@dataclass(frozen=True, slots=True)
class Restored:
    """A sweep read back from run directories.

    Attributes:
        trials: Every number from 0 on; one without a run waits to be drawn.
        next_run: Above the number of every directory there is, damaged ones included.
        values, reasons, outcomes: By run id, from result.json.
        starts: By run id, (lease_epoch, start step) of its attempts, from the manifests.
        ends: By run id, the step that the last of them reached, as far as is known.
        reports: By trial number, step → reported value.
        retried: Runs that a later trial retries.
    """

    new: NewSweep
    trials: Sequence[Proposal]
    runs: Sequence[Run]
    values: Mapping[str, float | None]
    reasons: Mapping[str, str]
    outcomes: Mapping[str, str | None]
    starts: Mapping[str, Sequence[tuple[int, int]]]
    ends: Mapping[str, int]
    reports: Mapping[int, Mapping[int, float]]
    retried: Set[str]
    next_run: int


def write(connection: Connection, restored: Restored, now: float) -> None:
    """Write all of it: sweep, study, trials, runs, attempts."""
    sweep_id, study_id = sweep_rows.insert_sweep(connection, restored.new)
    deciding = {run.trial: run for run in restored.runs if run.state is not State.SUPERSEDED}
    ids = {
        trial.number: _restore_trial(connection, study_id, trial, deciding.get(trial.number), restored, now)
        for trial in restored.trials
    }
    for run in restored.runs:
        known = replace(run, sweep_id=sweep_id, trial_id=ids[run.trial])
        _restore_run(connection, known, restored, now)
    execute(
        connection,
        "UPDATE sweeper_sweep SET next_run=:n WHERE sweep_id=:s", n=restored.next_run, s=sweep_id,
    )  # fmt: skip


def _restore_trial(
    connection: Connection, study_id: int, trial: Proposal, run: Run | None, restored: Restored, now: float
) -> int:
    trial_id = optuna_rows.insert_trial(
        connection, study_id, trial.number, "RUNNING" if run else "WAITING", trial
    )
    for step, value in restored.reports.get(trial.number, {}).items():
        optuna_rows.insert_report(connection, trial_id, step=step, value=value)
        sweep_rows.insert_verdict(connection, trial_id, step=step, value=value, prune=False)
    if run is not None and run.state.is_final:
        optuna_rows.tell(connection, trial_id, run.state, restored.values[run.run_id], now)
    return trial_id


def _restore_run(connection: Connection, run: Run, restored: Restored, now: float) -> None:
    starts, outcome = restored.starts[run.run_id], restored.outcomes.get(run.run_id)
    insert(
        connection, "sweeper_run",
        run_id=run.run_id, sweep_id=run.sweep_id, number=run.number, trial_id=run.trial_id, trial=run.trial, params=json.dumps(run.params),
        seed=run.seed, threads=run.threads, path=run.path, wandb_run_id=run.wandb_run_id, state=str(run.state),
        outcome=outcome, reason=restored.reasons.get(run.run_id), value=sweep_rows.finite(restored.values.get(run.run_id)),
        lease_epoch=run.lease_epoch, attempts=max(run.attempts, len(starts)), global_step=run.global_step,
        checkpoint_step=run.checkpoint_step, is_retried=run.run_id in restored.retried,
        replaces=run.replaces, retry_of=run.retry_of, created_at=now, updated_at=now,
    )  # fmt: skip
    # How far an attempt came is not known, but that the next one went on from there, or before.
    ends = [*(start for _, start in starts[1:]), restored.ends[run.run_id]]
    for number, ((epoch, start), end) in enumerate(zip(starts, ends, strict=False), 1):
        ended = outcome if outcome and number == len(starts) else str(Outcome.LOST)
        insert(
            connection, "sweeper_attempt",
            run_id=run.run_id, attempt=number, lease_epoch=epoch, owner="{}", started_at=now, start_step=start,
            end_step=max(start, end), outcome=ended, reason="rebuilt from the run directory",
        )  # fmt: skip
