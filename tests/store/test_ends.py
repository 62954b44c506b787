"""How far an attempt came that nobody lived to tell of: as far as the rows of its metrics log."""

from __future__ import annotations

import pytest
import sweeps

from sweeper.errors import Fenced
from sweeper.records import Claim, Sweep
from sweeper.store import Store


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


def ends(store: Store, claim: Claim) -> list[int | None]:
    return [row["end_step"] for row in sweeps.attempts(store, claim.run.run_id)]


def test_the_next_owner_says_how_far_the_rows_of_the_last_training_went(store: Store, sweep: Sweep) -> None:
    first = sweeps.must_draw(store, sweep)
    store.record_start(first.lease, step=0, total_steps=60)
    store.record_checkpoint(first.lease, step=20)
    second = sweeps.take_over(store, first.run)
    assert ends(store, first) == [20, None]
    store.record_end(second.lease, step=27)
    assert ends(store, first) == [27, None], "its own training has not begun"
    store.record_end(second.lease, step=26)
    assert ends(store, first) == [27, None], "it is only raised"
    store.record_start(second.lease, step=20, total_steps=60)
    store.record_end(second.lease, step=43)
    store.record_checkpoint(second.lease, step=40)
    store.release(second.lease, sweeps.LOST)
    assert ends(store, first) == [27, 43], "ending an attempt does not lower it"
    third = sweeps.must_claim(store, first.run)
    store.record_start(third.lease, step=40, total_steps=60)
    store.record_checkpoint(third.lease, step=60)
    sweeps.complete(store, third)
    steps, _ = store.run_costs(third.run.run_id)
    assert steps == {"trained": 70, "recovered": 60, "lost": 10, "goodput": 60 / 70}


def test_who_lost_the_lease_says_nothing_of_rows_that_are_another_s(store: Store, sweep: Sweep) -> None:
    first = sweeps.must_draw(store, sweep)
    store.record_start(first.lease, step=0, total_steps=60)
    second = sweeps.take_over(store, first.run)
    with pytest.raises(Fenced):
        store.record_end(first.lease, step=50)
    assert ends(store, second) == [0, None]
