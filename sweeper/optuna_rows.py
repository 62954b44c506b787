"""Every statement on Optuna's own tables: studies, trials and what belongs to a trial.

All of them run in a transaction of the store, so that slot, trial and run come to be at once,
and so do the final state and the tell. What this leans on is in
docs/decisions/0005-own-sql-on-optunas-tables.md, and is checked when a database is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.engine import Connection

from sweeper import clock
from sweeper.database import execute, execute_many
from sweeper.errors import StorageError
from sweeper.records import Proposal
from sweeper.states import OPTUNA_STATE, State


@dataclass(slots=True)
class TrialRow:
    """One trial of an Optuna study, as its tables hold it."""

    trial_id: int
    number: int
    state: str
    started_at: Any
    completed_at: Any
    value: float | None
    params: dict[str, tuple[float, str]]
    reports: dict[int, float]
    system_attrs: dict[str, str]


# --- writing -------------------------------------------------------------------------------


def insert_study(connection: Connection, name: str, direction: str) -> int:
    """A study with one objective. Raises StorageError when somebody else's has the name."""
    if execute(connection, "SELECT 1 FROM studies WHERE study_name=:n", n=name).first():
        raise StorageError(
            f"the database already holds an Optuna study {name!r} that is not one of sweeper's",
            do="Choose another sweep.name=.",
        )
    study_id = execute(
        connection, "INSERT INTO studies (study_name) VALUES (:n) RETURNING study_id", n=name
    ).scalar_one()
    execute(
        connection,
        "INSERT INTO study_directions (direction, study_id, objective) VALUES (:d, :s, 0)",
        d=direction.upper(), s=study_id,
    )  # fmt: skip
    return int(study_id)


def lock_study(connection: Connection, study_id: int) -> None:
    """Whoever draws a trial waits here for the others, as Optuna's own workers do; what is read afterwards holds.

    HAZARD: on PostgreSQL this must be a statement of its own, before the one that counts. SQLite's
    transactions begin with the write lock.
    """
    if connection.dialect.name != "sqlite":
        execute(connection, "SELECT 1 FROM studies WHERE study_id=:s FOR UPDATE", s=study_id)


def insert_trial(connection: Connection, study_id: int, number: int, state: str, proposal: Proposal) -> int:
    """A trial with its parameters; one that is WAITING may be drawn later. Returns its id."""
    trial_id = execute(
        connection,
        "INSERT INTO trials (number, study_id, state, datetime_start) VALUES (:n, :s, :state, :start) RETURNING trial_id",
        n=number, s=study_id, state=state, start=None if state == "WAITING" else _optuna_time(clock.wall_s()),
    ).scalar_one()  # fmt: skip
    _insert_params(connection, trial_id, proposal.internal)
    insert_attrs(connection, trial_id, proposal.system_attrs)
    return int(trial_id)


def _insert_params(connection: Connection, trial_id: int, internal: Mapping[str, tuple[float, str]]) -> None:
    execute_many(
        connection,
        "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (:t, :n, :v, :d) "
        "ON CONFLICT (trial_id, param_name) DO NOTHING",
        [{"t": trial_id, "n": name, "v": value, "d": text} for name, (value, text) in internal.items()],
    )


def insert_attrs(connection: Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
    """What samplers and pruners want remembered of a trial; the newest value stays."""
    for key, value in attrs.items():
        execute(
            connection,
            'INSERT INTO trial_system_attributes (trial_id, "key", value_json) VALUES (:t, :k, :v) '
            'ON CONFLICT (trial_id, "key") DO UPDATE SET value_json=excluded.value_json',
            t=trial_id, k=key, v=json.dumps(value),
        )  # fmt: skip


def insert_report(connection: Connection, trial_id: int, *, step: int, value: float) -> None:
    """An intermediate value; the first one of a step stays."""
    number, kind = _optuna_value(value)
    execute(
        connection,
        "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
        "VALUES (:t, :s, :v, :k) ON CONFLICT (trial_id, step) DO NOTHING",
        t=trial_id, s=step, v=number, k=kind,
    )  # fmt: skip


def take_trial(connection: Connection, study_id: int, proposal: Proposal) -> int | None:
    """Make the proposed trial RUNNING and return its id; None when the proposal is stale."""
    if proposal.waiting_id is None:
        if next_trial(connection, study_id) != proposal.number:
            return None
        return insert_trial(connection, study_id, proposal.number, "RUNNING", proposal)
    taken = execute(
        connection,
        "UPDATE trials SET state='RUNNING', datetime_start=:now WHERE trial_id=:t AND state='WAITING'",
        now=_optuna_time(clock.wall_s()), t=proposal.waiting_id,
    )  # fmt: skip
    if taken.rowcount != 1:
        return None
    _insert_params(connection, proposal.waiting_id, proposal.internal)
    return proposal.waiting_id


def requeue_orphans(connection: Connection, sweep_id: int) -> int:
    """Put RUNNING trials of the sweep's study that no run stands behind back in the queue."""
    adopted: int = execute(
        connection,
        "UPDATE trials SET state='WAITING' WHERE state='RUNNING' AND study_id="
        "(SELECT study_id FROM sweeper_sweep WHERE sweep_id=:s) AND NOT EXISTS "
        "(SELECT 1 FROM sweeper_run WHERE sweeper_run.trial_id=trials.trial_id)",
        s=sweep_id,
    ).rowcount
    return adopted


def tell(connection: Connection, trial_id: int, state: State, value: float | None, now: float) -> None:
    """Give a trial its final state and value, once: only one that is still RUNNING."""
    told = execute(
        connection,
        "UPDATE trials SET state=:state, datetime_complete=:now WHERE trial_id=:t AND state='RUNNING'",
        state=OPTUNA_STATE[state], now=_optuna_time(now), t=trial_id,
    )  # fmt: skip
    # A trial pruned at NaN has no value: Optuna knows no other way.
    is_nan = value is not None and value != value
    if told.rowcount == 1 and value is not None and not is_nan and state in (State.COMPLETED, State.PRUNED):
        number, kind = _optuna_value(value)
        execute(
            connection,
            "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (:t, 0, :v, :k)",
            t=trial_id, v=number, k=kind,
        )  # fmt: skip


# --- reading -------------------------------------------------------------------------------


def next_trial(connection: Connection, study_id: int) -> int:
    """The number after the last trial's."""
    last = execute(connection, "SELECT max(number) FROM trials WHERE study_id=:s", s=study_id).scalar_one()
    return 0 if last is None else int(last) + 1


def first_waiting(connection: Connection, study_id: int) -> int | None:
    """The number of the trial to draw first among those that wait.

    What somebody asked for (a retry, `enqueue_trial`) comes before points that wait from the start.
    """
    waiting = "FROM trials t WHERE t.study_id=:s AND t.state='WAITING'"
    asked_for = "EXISTS (SELECT 1 FROM trial_system_attributes a WHERE a.trial_id=t.trial_id)"
    first: int | None = execute(connection, f"SELECT min(t.number) {waiting}", s=study_id).scalar_one()
    if first is None:
        return None
    # Whatever is asked for gets the largest number; a look at the last one spares a look at all.
    last = f"SELECT {asked_for} {waiting} ORDER BY t.number DESC LIMIT 1"
    # PostgreSQL shows each statement what is committed by then: others may have drawn the last meanwhile.
    if execute(connection, last, s=study_id).scalar():
        asked: int | None = execute(
            connection, f"SELECT min(t.number) {waiting} AND {asked_for}", s=study_id
        ).scalar_one()
        return first if asked is None else asked
    return first


def params_of(connection: Connection, trial_id: int) -> dict[str, tuple[float, str]]:
    """Parameter → (internal representation, JSON of its distribution)."""
    rows = execute(
        connection,
        "SELECT param_name, param_value, distribution_json FROM trial_params WHERE trial_id=:t",
        t=trial_id,
    ).all()
    return {name: (value, text) for name, value, text in rows}


def read_trials(
    connection: Connection, study_id: int, *, after: int, numbers: Sequence[int]
) -> list[TrialRow]:
    """Trials of a study with number > `after` or in `numbers`, by number: four joined queries."""
    chosen = (
        "(number > :after"
        + (f" OR number IN ({', '.join(str(int(n)) for n in numbers)})" if numbers else "")
        + ")"
    )
    query = f"FROM trials t LEFT JOIN %s x ON x.trial_id=t.trial_id WHERE t.study_id=:s AND {chosen}"
    heads = execute(
        connection,
        "SELECT t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete, x.value, x.value_type " + query % "trial_values",
        s=study_id, after=after,
    ).all()  # fmt: skip
    params = execute(
        connection, "SELECT t.number, x.param_name, x.param_value, x.distribution_json " + (query % "trial_params").replace("LEFT ", ""),
        s=study_id, after=after,
    ).all()  # fmt: skip
    middle = execute(
        connection,
        "SELECT t.number, x.step, x.intermediate_value, x.intermediate_value_type "
        + (query % "trial_intermediate_values").replace("LEFT ", ""),
        s=study_id, after=after,
    ).all()  # fmt: skip
    attrs = execute(
        connection, 'SELECT t.number, x."key", x.value_json ' + (query % "trial_system_attributes").replace("LEFT ", ""),
        s=study_id, after=after,
    ).all()  # fmt: skip
    return _trial_rows(heads, params, middle, attrs)


def _trial_rows(
    heads: Sequence[Any], params: Sequence[Any], middle: Sequence[Any], attrs: Sequence[Any]
) -> list[TrialRow]:
    rows = {
        number: TrialRow(trial_id, number, state, started, completed, _python_value(value, kind), {}, {}, {})
        for trial_id, number, state, started, completed, value, kind in heads
    }
    for number, name, value, distribution in params:
        rows[number].params[name] = (value, distribution)
    for number, step, value, kind in middle:
        rows[number].reports[step] = _python_value(value, kind) or 0.0
    for number, key, text in attrs:
        rows[number].system_attrs[key] = text
    return [rows[number] for number in sorted(rows)]


# --- values --------------------------------------------------------------------------------


def _optuna_time(now: float) -> str:
    """Optuna 5 keeps naive UTC."""
    return datetime.fromtimestamp(now, UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


def _optuna_value(value: float) -> tuple[float | None, str]:
    if value != value:
        return None, "NAN"
    if value in (float("inf"), float("-inf")):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return value, "FINITE"


def _python_value(value: float | None, kind: str | None) -> float | None:
    special = {"NAN": "nan", "INF_POS": "inf", "INF_NEG": "-inf"}
    return float(special[kind]) if kind in special else value
