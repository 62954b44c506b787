"""The rows that `sweeper.reading` returns: plain dicts, typed for the checker.

Nothing imports this at run time: `typing` and `dataclasses` would cost a listing more than the
rows are worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

from sweeper.costs import Resumption, Steps
from sweeper.records import Params


class SweepRow(TypedDict):
    """A named search. `config` is in `Reading.sweep` only."""

    sweep_id: int
    name: str
    seed: int
    n_trials: int
    metric: str
    direction: str
    is_cancelled: bool
    created_at: float


class RunRow(TypedDict):
    """One run. `path` is relative to the data directory.

    `owner` is the ProcessId of a running one's owner as a dict, None for all others.
    """

    run_id: str
    sweep: str
    number: int
    trial: int
    params: Params
    seed: int
    path: str
    wandb_run_id: str
    state: str
    outcome: str | None
    reason: str | None
    value: float | None
    owner: dict[str, Any] | None
    worker: str | None
    lease_epoch: int
    lease_until: float | None
    attempts: int
    global_step: int
    total_steps: int | None
    checkpoint_step: int | None
    replaces: str | None
    retry_of: str | None
    is_retried: bool


class AttemptRow(TypedDict):
    """One execution of a run; `outcome` and `ended_at` are None while it lasts."""

    run_id: str
    attempt: int
    lease_epoch: int
    owner: dict[str, Any] | None
    started_at: float
    went_on_at: float | None
    ended_at: float | None
    start_step: int | None
    end_step: int | None
    checkpoint_step: int | None
    outcome: str | None
    reason: str | None
    detail: str | None


class Counts(TypedDict):
    """How many runs of a sweep are where.

    `done` trials have their result (completed, pruned, or failed and not retried); `resumed`
    are runs with more than one attempt; `retried` are failed runs out of the count.
    """

    n_trials: int
    done: int
    running: int
    interrupted: int
    completed: int
    pruned: int
    failed: int
    superseded: int
    cancelled: int
    retried: int
    resumed: int


class Progress(TypedDict):
    """One consistent picture of a sweep, for a progress display.

    `open_runs` are the running and interrupted ones.
    """

    sweep: str
    metric: str
    direction: str
    is_cancelled: bool
    is_complete: bool
    counts: Counts
    steps: Steps
    resumption: Resumption
    best: RunRow | None
    open_runs: list[RunRow]


class Database(Protocol):
    """One open database, of either kind; what `sweeper.reading` needs of it."""

    def rows(self, sql: str, parameters: Mapping[str, object]) -> list[dict[str, Any]]: ...
    def tables(self) -> set[str]: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def close(self) -> None: ...
