"""Failures cost a budget of their own class, counted in the database; a newer checkpoint refills it."""

from __future__ import annotations

import pytest
import sweeps

from sweeper import processes, recovery
from sweeper.connections import Database
from sweeper.records import Claim, Ending, Sweep
from sweeper.states import Outcome, State
from sweeper.store import Store

COSTLY = {Outcome.LOST: "lost_count", Outcome.CRASHED: "crashed_count", Outcome.OOM: "oom_count"}
FREE = [Outcome.PREEMPTED, Outcome.TIMEOUT]


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


def end(store: Store, claim: Claim, outcome: Outcome) -> Claim:
    """End an attempt so, and claim the run again."""
    store.release(claim.lease, Ending(outcome, "so"))
    return sweeps.must_claim(store, claim.run)


def counts(claim: Claim) -> dict[Outcome, int]:
    return {outcome: getattr(claim.run, column) for outcome, column in COSTLY.items()}


@pytest.mark.parametrize("outcome", COSTLY)
def test_attempts_without_a_newer_checkpoint_count_in_a_row(
    store: Store, sweep: Sweep, outcome: Outcome
) -> None:
    claim = sweeps.must_draw(store, sweep)
    for ended in range(4):
        assert counts(claim) == {other: ended if other is outcome else 0 for other in COSTLY}
        assert store.budget_after(claim.lease, outcome) == ended + 1
        claim = end(store, claim, outcome)


@pytest.mark.parametrize("outcome", FREE)
def test_preemption_and_time_outs_are_free(store: Store, sweep: Sweep, outcome: Outcome) -> None:
    claim = end(store, sweeps.must_draw(store, sweep), Outcome.CRASHED)
    for _ in range(5):
        assert store.budget_after(claim.lease, outcome) == 0
        claim = end(store, claim, outcome)
    assert counts(claim)[Outcome.CRASHED] == 1, "but they do not refill a budget either"


def test_a_disk_that_refused_is_not_the_runs_fault(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    store.release(claim.lease, Ending(Outcome.LOST, "disk full", is_disk_fault=True))
    again = sweeps.must_claim(store, claim.run)
    assert set(counts(again).values()) == {0}
    assert [row["outcome"] for row in sweeps.attempts(store, claim.run.run_id)] == [Outcome.LOST, None]


def test_a_newer_checkpoint_refills_all_budgets(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    for outcome in COSTLY:
        claim = end(store, claim, outcome)
    assert set(counts(claim).values()) == {1}

    store.record_checkpoint(claim.lease, step=5)
    assert set(counts_now(store, claim).values()) == {0}
    assert store.budget_after(claim.lease, Outcome.CRASHED) == 0, "the attempt that saved is not counted"
    claim = end(store, claim, Outcome.CRASHED)
    assert set(counts(claim).values()) == {0}
    assert store.budget_after(claim.lease, Outcome.CRASHED) == 1, "the next one is"


def test_the_longest_save_of_a_sweep_is_known_to_later_attempts(store: Store, sweep: Sweep) -> None:
    assert store.longest_save_s(sweep.sweep_id) == 0.0
    claim = sweeps.must_draw(store, sweep)
    for step, seconds in enumerate((2.0, 7.5, 3.0), start=1):
        store.record_checkpoint(claim.lease, step=step, seconds=seconds)
    assert store.longest_save_s(sweep.sweep_id) == 7.5


def counts_now(store: Store, claim: Claim) -> dict[Outcome, int]:
    run = store.run(claim.run.run_id)
    return {outcome: getattr(run, column) for outcome, column in COSTLY.items()}


def test_a_takeover_counts_as_one_loss(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    for losses in range(1, 4):
        claim = sweeps.take_over(store, claim.run)
        assert counts(claim)[Outcome.LOST] == losses


def test_a_takeover_after_a_checkpoint_costs_nothing(store: Store, sweep: Sweep) -> None:
    claim = sweeps.take_over(store, sweeps.must_draw(store, sweep).run)
    store.record_checkpoint(claim.lease, step=5)
    assert counts(sweeps.take_over(store, claim.run))[Outcome.LOST] == 0


def test_the_budget_belongs_to_the_trial_and_survives_a_fresh_run(store: Store, sweep: Sweep) -> None:
    claim = end(store, sweeps.must_draw(store, sweep), Outcome.CRASHED)
    fresh = sweeps.supersede(store, sweep, claim)
    assert (fresh.run.trial, counts(fresh)[Outcome.CRASHED]) == (claim.run.trial, 1)
    assert store.budget_after(fresh.lease, Outcome.CRASHED) == 2


@pytest.mark.parametrize(("outcome", "limit"), [(Outcome.LOST, 3), (Outcome.CRASHED, 1), (Outcome.OOM, 0)])
def test_a_run_is_failed_by_the_attempt_beyond_its_budget_and_not_before(
    store: Store, sweep: Sweep, outcome: Outcome, limit: int
) -> None:
    retry = {f"max_{outcome}": limit}
    claim = sweeps.must_draw(store, sweep)
    for _ in range(limit):
        decision = decide(store, claim, outcome, retry)
        assert decision.action is recovery.Action.RELEASE
        claim = end(store, claim, outcome)
    last = decide(store, claim, outcome, retry)
    assert (last.action, last.state) == (recovery.Action.SETTLE, State.FAILED)
    assert f"retry.max_{outcome}={limit}" in last.reason


def decide(store: Store, claim: Claim, outcome: Outcome, retry: dict[str, int]) -> recovery.Decision:
    count = store.budget_after(claim.lease, outcome)
    return recovery.after(Ending(outcome, "so"), count=count, retry=retry, on_invalid="fresh")


# --- backing off -------------------------------------------------------------------------------


class Wall:
    """A wall clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_800_000_000.0
        monkeypatch.setattr(Database, "_now", lambda store, connection: self.now_s)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    return Wall(monkeypatch)


def back_off(store: Store, sweep: Sweep, wall: Wall, seconds: float) -> Claim:
    claim = sweeps.must_draw(store, sweep)
    store.release(claim.lease, sweeps.LOST, back_off_s=seconds)
    return claim


def any_claim(store: Store, sweep: Sweep) -> Claim | None:
    return store.claim(sweep.sweep_id, owner=processes.identify(), worker="w:1")


def test_a_run_that_backs_off_is_left_alone_until_its_time(store: Store, sweep: Sweep, wall: Wall) -> None:
    back_off(store, sweep, wall, 30.0)
    wall.now_s += 29.9
    assert any_claim(store, sweep) is None
    wall.now_s += 0.1
    assert any_claim(store, sweep) is not None


def test_a_canceller_does_not_wait_for_the_back_off(store: Store, sweep: Sweep, wall: Wall) -> None:
    claim = back_off(store, sweep, wall, 30.0)
    assert sweeps.claim(store, claim.run) is not None


def test_a_clock_set_back_two_hours_does_not_block_a_claim(store: Store, sweep: Sweep, wall: Wall) -> None:
    back_off(store, sweep, wall, 30.0)
    wall.now_s -= 7200.0
    assert any_claim(store, sweep) is not None
