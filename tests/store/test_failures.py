"""How long an attempt of a sweep runs between two failures, from which checkpoints get their interval."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sweeps

from sweeper import clock
from sweeper.connections import Database
from sweeper.records import Ending, Sweep
from sweeper.states import FAILURES, Outcome
from sweeper.store import ASSUMED_S, Store

HOUR = 3600.0


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass."""
    now = [clock.wall_s()]
    monkeypatch.setattr(Database, "_now", lambda store, connection: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_before_anything_was_seen_an_hour_is_assumed(store: Store, sweep: Sweep) -> None:
    assert store.mean_time_between_failures_s(sweep.sweep_id) == ASSUMED_S == HOUR


def test_time_without_a_failure_makes_it_longer(
    store: Store, sweep: Sweep, later: Callable[[float], None]
) -> None:
    sweeps.must_draw(store, sweep)
    later(3 * HOUR)  # it still runs
    assert store.mean_time_between_failures_s(sweep.sweep_id) == pytest.approx(4 * HOUR)


@pytest.mark.parametrize(
    "outcome", sorted({*Outcome} - {Outcome.COMPLETED, Outcome.PRUNED, Outcome.CANCELLED})
)
def test_failures_make_it_shorter_and_preemptions_do_not(
    store: Store, sweep: Sweep, later: Callable[[float], None], outcome: Outcome
) -> None:
    claim = sweeps.must_draw(store, sweep)
    for _ in range(3):
        later(HOUR)
        store.release(claim.lease, Ending(outcome, "so"))
        claim = sweeps.must_claim(store, claim.run)
    expected = 4 * HOUR / (4 if outcome in FAILURES else 1)
    assert store.mean_time_between_failures_s(sweep.sweep_id) == pytest.approx(expected)
    assert (outcome in FAILURES) == (outcome is not Outcome.PREEMPTED)


def test_attempts_at_the_same_time_count_each(
    store: Store, sweep: Sweep, later: Callable[[float], None]
) -> None:
    claims = [sweeps.must_draw(store, sweep) for _ in range(4)]
    later(HOUR)
    store.release(claims[0].lease, Ending(Outcome.LOST, "so"))
    assert store.mean_time_between_failures_s(sweep.sweep_id) == pytest.approx((1 + 4) * HOUR / 2)


def test_other_sweeps_do_not_count(store: Store, sweep: Sweep, later: Callable[[float], None]) -> None:
    other = sweeps.make(store, "other")
    claim = sweeps.must_draw(store, other)
    later(HOUR)
    store.release(claim.lease, Ending(Outcome.LOST, "so"))
    assert store.mean_time_between_failures_s(sweep.sweep_id) == HOUR


def test_a_clock_that_was_put_back_is_no_negative_time(
    store: Store, sweep: Sweep, later: Callable[[float], None]
) -> None:
    sweeps.must_draw(store, sweep)
    later(-HOUR)
    assert store.mean_time_between_failures_s(sweep.sweep_id) == HOUR
