"""Peer: Optuna lists the unfinished among many trials. First call with `fill` and a count, then `list`.

Usage: peer_optuna_list.py DIRECTORY fill RUNS UNFINISHED | list
"""

from __future__ import annotations

import json
import sqlite3
import sys

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
PARAMS = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1),
    "dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
    "momentum": optuna.distributions.FloatDistribution(0.0, 1.0),
}


def fill(path: str, runs: int, unfinished: int) -> None:
    """A study with `runs` trials, the last `unfinished` of them running; rows are inserted in bulk."""
    optuna.create_study(study_name="bench", storage=f"sqlite:///{path}")
    rows = range(1, runs + 1)
    done = runs - unfinished
    with sqlite3.connect(path) as connection:
        connection.executemany(
            "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, datetime_complete)"
            " VALUES (?, ?, 1, ?, '2026-01-01 00:00:00.000000', ?)",
            (
                (row, row - 1, "COMPLETE", "2026-01-01 00:00:01.000000")
                if row <= done
                else (row, row - 1, "RUNNING", None)
                for row in rows
            ),
        )
        connection.executemany(
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
            " VALUES (?, ?, 0.01, ?)",
            (
                (row, name, optuna.distributions.distribution_to_json(distribution))
                for name, distribution in PARAMS.items()
                for row in rows
            ),
        )
        connection.executemany(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, 0, 0.5, 'FINITE')",
            ((row,) for row in range(1, done + 1)),
        )


def unfinished(path: str) -> list[int]:
    """What a user of Optuna writes."""
    study = optuna.load_study(study_name="bench", storage=f"sqlite:///{path}")
    states = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING)
    return [trial.number for trial in study.get_trials(deepcopy=False, states=states)]


if __name__ == "__main__":
    database = f"{sys.argv[1]}/optuna.db"
    if sys.argv[2] == "fill":
        fill(database, int(sys.argv[3]), int(sys.argv[4]))
    else:
        print(json.dumps({"unfinished": len(unfinished(database))}))
