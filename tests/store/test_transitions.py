"""The one table of transitions against the guarded UPDATEs: what it has happens, nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import sweeps

from sweeper import optuna_rows, processes, sweep_rows
from sweeper.errors import Fenced
from sweeper.records import Claim, Ending, Lease, Suspect, Sweep
from sweeper.states import OPTUNA_STATE, TRANSITIONS, Event, Outcome, State
from sweeper.store import Store

ENDINGS = {
    Event.RELEASE: Ending(Outcome.PREEMPTED, "SIGTERM"),
    Event.COMPLETE: Ending(Outcome.COMPLETED, value=0.25),
    Event.PRUNE: Ending(Outcome.PRUNED, "median", value=0.75),
    Event.FAIL: Ending(Outcome.CRASHED, "ValueError: no"),
    Event.SUPERSEDE: Ending(Outcome.CRASHED, "no checkpoint is good"),
    Event.CANCEL: Ending(Outcome.CANCELLED, "by the user"),
}
FINAL = {
    Event.COMPLETE: State.COMPLETED,
    Event.PRUNE: State.PRUNED,
    Event.FAIL: State.FAILED,
    Event.CANCEL: State.CANCELLED,
}


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


def bring_to(state: State, store: Store, sweep: Sweep) -> Claim:
    """Draw a run and bring it to `state`; returns the last claim anybody had on it."""
    claim = sweeps.must_draw(store, sweep)
    event = next((event for (_, event), after in TRANSITIONS.items() if after is state), None)
    if state is not State.RUNNING:
        assert event is not None
        act(event, store, sweep, claim)
    assert store.run(claim.run.run_id).state is state
    return claim


def act(event: Event, store: Store, sweep: Sweep, claim: Claim) -> Lease | None:
    """Let `event` happen to the claimed run, through the store's own method for it."""
    lease, run = claim.lease, claim.run
    if event is Event.CLAIM:
        found = sweeps.claim(store, run)
        return found.lease if found else None
    if event is Event.TAKE_OVER:
        found = store.take_over(seen(store, claim), owner=processes.identify(), worker="w:1", reason="gone")
        return found.lease if found else None
    if event is Event.RELEASE:
        store.release(lease, ENDINGS[event])
    elif event is Event.SUPERSEDE:
        return sweeps.supersede(store, sweep, claim, ENDINGS[event]).lease
    else:
        store.settle(lease, FINAL[event], ENDINGS[event])
    return lease


def seen(store: Store, claim: Claim) -> Suspect:
    """The run as an observer saw it while it was still running."""
    (row,) = (row for row in sweeps.rows(store, "sweeper_run") if row["run_id"] == claim.run.run_id)
    return Suspect(
        row["run_id"], row["lease_epoch"], row["heartbeat"], 0.0, row["lost_count"], processes.identify(), ()
    )


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_an_event_does_what_the_table_says_or_nothing(
    store: Store, sweep: Sweep, state: State, event: Event
) -> None:
    claim = bring_to(state, store, sweep)
    before = sweeps.everything(store)

    try:
        happened = act(event, store, sweep, claim) is not None
    except Fenced:
        happened = False

    if (state, event) in TRANSITIONS:
        assert happened
        assert store.run(claim.run.run_id).state is TRANSITIONS[state, event]
    else:
        assert not happened
        assert sweeps.everything(store) == before


@pytest.mark.parametrize(("state", "event"), TRANSITIONS)
def test_each_transition_leaves_its_attempt_row(
    store: Store, sweep: Sweep, state: State, event: Event
) -> None:
    claim = bring_to(state, store, sweep)
    run_id = claim.run.run_id
    lease = act(event, store, sweep, claim)

    found = sweeps.attempts(store, run_id)
    if event in (Event.CLAIM, Event.TAKE_OVER):
        assert lease is not None
        assert [row["lease_epoch"] for row in found] == [claim.lease.lease_epoch, lease.lease_epoch]
        assert found[0]["outcome"] is not None
        assert (found[1]["outcome"], found[1]["attempt"]) == (None, 2)
    else:
        (row,) = found
        assert (row["outcome"], row["reason"]) == (ENDINGS[event].outcome, ENDINGS[event].reason)
        assert row["ended_at"] is not None
    if event is Event.SUPERSEDE:
        assert lease is not None
        assert [row["outcome"] for row in sweeps.attempts(store, lease.run_id)] == [None]


@pytest.mark.parametrize(("state", "event"), TRANSITIONS)
@pytest.mark.parametrize("statement", ["insert_attempt", "end_attempt", "tell"])
def test_a_transition_and_its_rows_are_one_transaction(
    store: Store, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, state: State, event: Event, statement: str
) -> None:
    claim = bring_to(state, store, sweep)
    before = sweeps.everything(store)
    calls = break_after(statement, monkeypatch)

    failed = False
    try:
        act(event, store, sweep, claim)
    except ZeroDivisionError:
        failed = True

    assert failed == bool(calls)
    if failed:
        assert sweeps.everything(store) == before


def break_after(statement: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a part of a transaction fail once it has written; returns the calls it got."""
    module = optuna_rows if statement == "tell" else sweep_rows
    real: Callable[..., object] = getattr(module, statement)
    calls: list[str] = []

    def broken(*args: object, **more: object) -> None:
        real(*args, **more)
        calls.append(statement)
        raise ZeroDivisionError

    monkeypatch.setattr(module, statement, broken)
    return calls


def test_drawing_is_one_transaction(store: Store, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sweeps.everything(store)
    break_after("insert_attempt", monkeypatch)
    with pytest.raises(ZeroDivisionError):
        sweeps.draw(store, sweep)
    assert sweeps.everything(store) == before
    monkeypatch.undo()
    assert sweeps.must_draw(store, sweep).run.number == 0, "no number was used up"


@pytest.mark.parametrize("state", State)
def test_the_trial_of_a_run_is_in_the_state_the_table_says(store: Store, sweep: Sweep, state: State) -> None:
    claim = bring_to(state, store, sweep)
    (trial,) = sweeps.rows(store, "trials")
    assert trial["trial_id"] == claim.run.trial_id
    assert trial["state"] == OPTUNA_STATE[state]


def test_a_run_is_born_running_with_its_first_attempt_and_lease(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    assert (claim.run.state, claim.run.lease_epoch, claim.is_new) == (State.RUNNING, 1, True)
    (row,) = sweeps.attempts(store, claim.run.run_id)
    assert (row["attempt"], row["lease_epoch"], row["outcome"]) == (1, 1, None)
    store.check(claim.lease)


def test_a_trial_is_told_once(store: Store, sweep: Sweep) -> None:
    claim = bring_to(State.COMPLETED, store, sweep)
    sweeps.execute(store, "UPDATE sweeper_run SET state='interrupted' WHERE run_id=:r", r=claim.run.run_id)
    again = sweeps.must_claim(store, claim.run)
    sweeps.fail(store, again)
    (trial,) = sweeps.rows(store, "trials")
    (value,) = sweeps.rows(store, "trial_values")
    assert (trial["state"], value["value"]) == ("COMPLETE", 0.25)
