"""Ours: a database with many runs, filled in bulk; the last UNFINISHED of them are interrupted.

Usage: ours_fill.py DIRECTORY RUNS UNFINISHED
"""

from __future__ import annotations

import sqlite3
import sys
import time

from bench.scripts.ours_asks import prepare

TRIALS = "INSERT INTO trials (trial_id, number, study_id, state) VALUES (?, ?, 1, ?)"
RUN_COLUMNS = (
    "run_id, sweep_id, number, trial_id, trial, params, seed, threads, path, wandb_run_id, state, outcome,"
    " value, lease_epoch, attempts, global_step, total_steps, checkpoint_step, created_at, updated_at"
)


def run_row(number: int, *, is_done: bool, now: float) -> tuple[object, ...]:
    """One run, as the store leaves it behind."""
    run_id = f"bench.r.{number:05d}"
    path = f"sweep/bench/runs/{run_id}"
    params = '{"trainer.dropout": 0.1, "trainer.lr": 0.01, "trainer.width": 64}'
    state, outcome, value = ("completed", "completed", 0.5) if is_done else ("interrupted", "lost", None)
    trial = number + 1
    who = (
        run_id,
        1,
        number,
        trial,
        number,
        params,
        number,
        1,
        path,
        f"{run_id}-abcdefgh",
        state,
        outcome,
        value,
    )
    return (*who, 1, 1, 1000, 2000, 1000, now, now)


if __name__ == "__main__":
    directory, runs, unfinished = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    prepare(f"sqlite:///{directory}/sweeper.db")
    done = runs - unfinished
    marks = ", ".join("?" * len(RUN_COLUMNS.split(",")))
    with sqlite3.connect(f"{directory}/sweeper.db") as connection:
        states = ((n + 1, n, "COMPLETE" if n < done else "RUNNING") for n in range(runs))
        connection.executemany(TRIALS, states)
        rows = (run_row(n, is_done=n < done, now=time.time()) for n in range(runs))
        connection.executemany(f"INSERT INTO sweeper_run ({RUN_COLUMNS}) VALUES ({marks})", rows)
        connection.execute("UPDATE sweeper_sweep SET next_run=?, n_trials=?", (runs, runs))
