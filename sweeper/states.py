"""States, outcomes, and the one table of transitions between states.

The table feeds the guarded UPDATEs of `sweeper.store`, the tests, and the diagram in the docs.
A *state* says where a run is; an *outcome* says why one attempt of it ended.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a run is."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETED = "completed"
    PRUNED = "pruned"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in INCOMPLETE


INCOMPLETE = frozenset({State.RUNNING, State.INTERRUPTED})


class Outcome(StrEnum):
    """Why an attempt ended."""

    COMPLETED = "completed"
    PRUNED = "pruned"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    LOST = "lost"
    CRASHED = "crashed"
    OOM = "oom"
    FENCED = "fenced"
    CANCELLED = "cancelled"


FAILURES = frozenset({Outcome.TIMEOUT, Outcome.LOST, Outcome.CRASHED, Outcome.OOM, Outcome.FENCED})
"""Ends of an attempt that cost what was trained since the last checkpoint."""


class Event(StrEnum):
    """What moves a run from one state to another."""

    CLAIM = "claim"  # an interrupted run gets an owner
    TAKE_OVER = "take_over"  # the lease of the owner is over
    RELEASE = "release"  # the attempt ended, the run did not
    COMPLETE = "complete"
    PRUNE = "prune"
    FAIL = "fail"
    SUPERSEDE = "supersede"  # a fresh run of the same trial takes its place
    CANCEL = "cancel"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.INTERRUPTED, Event.CLAIM): State.RUNNING,
    (State.RUNNING, Event.TAKE_OVER): State.RUNNING,
    (State.RUNNING, Event.RELEASE): State.INTERRUPTED,
    (State.RUNNING, Event.COMPLETE): State.COMPLETED,
    (State.RUNNING, Event.PRUNE): State.PRUNED,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.RUNNING, Event.SUPERSEDE): State.SUPERSEDED,
    (State.RUNNING, Event.CANCEL): State.CANCELLED,
}
"""(state before, event) → state after. What is not here does not happen.

A canceller first claims or takes over the run, so that a live owner is fenced; therefore
CANCEL, like every other final event, leaves from RUNNING.
"""

SETTLES: dict[State, Event] = {
    State.COMPLETED: Event.COMPLETE,
    State.PRUNED: Event.PRUNE,
    State.FAILED: Event.FAIL,
    State.CANCELLED: Event.CANCEL,
}
"""Final state a run is settled in → the event that leads there."""

OPTUNA_STATE: dict[State, str] = {
    State.RUNNING: "RUNNING",
    State.INTERRUPTED: "RUNNING",
    State.COMPLETED: "COMPLETE",
    State.PRUNED: "PRUNED",
    State.FAILED: "FAIL",
    State.SUPERSEDED: "RUNNING",
    State.CANCELLED: "FAIL",
}
"""State of a run → state of its trial in the Optuna study."""


def source(event: Event) -> State:
    """The only state that `event` leaves from."""
    states = {state for state, leaving in TRANSITIONS if leaving is event}
    (state,) = states
    return state


def target(event: Event) -> State:
    """The state that `event` leads to."""
    return TRANSITIONS[source(event), event]
