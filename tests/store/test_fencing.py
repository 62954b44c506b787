"""Who lost a run can harm nothing: every write carries the lease, and a lost one changes no row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sweeps

from sweeper import processes
from sweeper.errors import Fenced
from sweeper.records import Claim, Ending, Lease, Sweep
from sweeper.states import Outcome, State
from sweeper.store import Store

Method = Callable[[Store, Sweep, Claim, Lease], Any]
METHODS: dict[str, Method] = {
    "raise_epoch": lambda store, sweep, claim, lease: store.raise_epoch(lease, above=50),
    "renew": lambda store, sweep, claim, lease: store.renew(lease, global_step=7),
    "check": lambda store, sweep, claim, lease: store.check(lease),
    "record_processes": lambda store, sweep, claim, lease: store.record_processes(
        lease, [processes.identify()]
    ),
    "record_start": lambda store, sweep, claim, lease: store.record_start(lease, step=3, total_steps=9),
    "record_checkpoint": lambda store, sweep, claim, lease: store.record_checkpoint(lease, step=5),
    "record_end": lambda store, sweep, claim, lease: store.record_end(lease, step=5),
    "report": lambda store, sweep, claim, lease: store.report(
        lease, claim.run, step=5, value=0.5, prune=True, system_attrs={"completed_rung_0": 0.5}
    ),
    "release": lambda store, sweep, claim, lease: store.release(lease, sweeps.PREEMPTED),
    "settle": lambda store, sweep, claim, lease: store.settle(
        lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=0.1)
    ),
    "supersede": lambda store, sweep, claim, lease: sweeps.supersede(
        store, sweep, replace(claim, lease=lease)
    ),
}
LOSSES: dict[str, Callable[[Store, Sweep, Claim], Any]] = {
    "taken over": lambda store, sweep, claim: sweeps.take_over(store, claim.run),
    "cancelled": lambda store, sweep, claim: sweeps.cancel(store, sweeps.take_over(store, claim.run)),
    "completed": lambda store, sweep, claim: sweeps.complete(store, claim),
    "failed": lambda store, sweep, claim: sweeps.fail(store, claim),
    "released": lambda store, sweep, claim: store.release(claim.lease, sweeps.PREEMPTED),
    "released and claimed": lambda store, sweep, claim: (
        store.release(claim.lease, sweeps.PREEMPTED),
        sweeps.must_claim(store, claim.run),
    ),
    "superseded": lambda store, sweep, claim: sweeps.supersede(store, sweep, claim),
    "raised": lambda store, sweep, claim: store.raise_epoch(claim.lease, above=40),
}


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


def is_fenced(method: Method, store: Store, sweep: Sweep, claim: Claim, lease: Lease) -> bool:
    try:
        method(store, sweep, claim, lease)
    except Fenced:
        return True
    return False


def test_every_method_that_takes_a_lease_is_tested_here() -> None:
    takes_lease = {
        name
        for name, method in inspect.getmembers(Store, inspect.isfunction)
        if not name.startswith("_") and "lease" in inspect.signature(method).parameters
    }
    assert takes_lease == {*METHODS, "budget_after"}  # which decides nothing, and is only read


@pytest.mark.parametrize("method", METHODS)
def test_a_lease_that_holds_is_good_for_every_method(store: Store, sweep: Sweep, method: str) -> None:
    claim = sweeps.must_draw(store, sweep)
    METHODS[method](store, sweep, claim, claim.lease)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_lease_is_fenced_everywhere_and_changes_nothing(store: Store, sweep: Sweep, loss: str) -> None:
    claim = sweeps.must_draw(store, sweep)
    LOSSES[loss](store, sweep, claim)
    before = sweeps.everything(store)

    for name, method in METHODS.items():
        assert is_fenced(method, store, sweep, claim, claim.lease), name
        assert sweeps.everything(store) == before, name


@pytest.mark.parametrize("changes", [{"lease_epoch": 2}, {"lease_epoch": 0}, {"owner_token": "0" * 16}])
def test_epoch_and_token_must_both_agree(store: Store, sweep: Sweep, changes: dict[str, Any]) -> None:
    claim = sweeps.must_draw(store, sweep)
    wrong = sweeps.without_lease(claim.lease, **changes)
    before = sweeps.everything(store)

    for name, method in METHODS.items():
        assert is_fenced(method, store, sweep, claim, wrong), name
    assert sweeps.everything(store) == before


def test_a_lease_of_another_run_is_good_for_nothing(store: Store, sweep: Sweep) -> None:
    mine, other = sweeps.must_draw(store, sweep), sweeps.must_draw(store, sweep)
    wrong = sweeps.without_lease(mine.lease, run_id=other.run.run_id)
    for method in METHODS.values():
        with pytest.raises(Fenced):
            method(store, sweep, other, wrong)
    store.check(mine.lease)
    store.check(other.lease)


def test_raising_the_epoch_moves_lease_and_attempt_together(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    raised = store.raise_epoch(claim.lease, above=7)

    assert raised.lease_epoch == 8
    store.check(raised)
    store.record_start(raised, step=0, total_steps=10)
    store.record_checkpoint(raised, step=4)
    store.release(raised, sweeps.LOST)
    (attempt,) = sweeps.attempts(store, claim.run.run_id)
    assert (attempt["lease_epoch"], attempt["start_step"], attempt["checkpoint_step"]) == (8, 0, 4)
    assert attempt["outcome"] == Outcome.LOST
    assert sweeps.must_claim(store, claim.run).lease.lease_epoch == 9


def test_each_claim_has_a_larger_epoch_than_all_before(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    epochs = [claim.lease.lease_epoch]
    for _ in range(3):
        claim = sweeps.take_over(store, claim.run)
        epochs.append(claim.lease.lease_epoch)
        store.release(claim.lease, sweeps.PREEMPTED)
        claim = sweeps.must_claim(store, claim.run)
        epochs.append(claim.lease.lease_epoch)
    assert epochs == sorted(set(epochs))
    assert [row["lease_epoch"] for row in sweeps.attempts(store, claim.run.run_id)] == epochs


def test_of_two_who_take_over_what_they_saw_one_wins(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    seen = sweeps.suspect(store, claim.run)
    me = processes.identify()
    first = store.take_over(seen, owner=me, worker="w:1", reason="gone")
    second = store.take_over(seen, owner=me, worker="w:2", reason="gone")
    assert first is not None
    assert second is None


def test_an_owner_that_beats_once_more_is_not_taken_over(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    seen = sweeps.suspect(store, claim.run)
    store.renew(claim.lease)
    assert store.take_over(seen, owner=processes.identify(), worker="w:1", reason="gone") is None
    store.check(claim.lease)


def test_a_takeover_is_told_what_the_last_owner_left(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    trainer = replace(processes.identify(), pid=4_000_000, start_ticks=1)
    store.record_processes(claim.lease, [trainer])
    assert sweeps.take_over(store, claim.run).previous == (processes.identify(), trainer)


def test_a_claimer_takes_its_own_runs_first_then_the_furthest_along(store: Store, sweep: Sweep) -> None:
    for worker, step in [("w:0", 10), ("w:1", 80), ("w:0", 50), ("w:2", 90)]:
        claim = sweeps.must_draw(store, sweep, worker=worker)
        store.record_start(claim.lease, step=0, total_steps=100)
        store.record_checkpoint(claim.lease, step=step)
        store.release(claim.lease, sweeps.PREEMPTED)

    order = []
    while claimed := store.claim(sweep.sweep_id, owner=processes.identify(), worker="w:0"):
        order.append(claimed.run.number)
    assert order == [2, 0, 3, 1]
