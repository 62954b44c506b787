"""Grid: each point exactly once, none lost to an interruption, a failed one only again by `retry`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import sweeps

from sweeper.records import Params, Sweep
from sweeper.search import Search
from sweeper.store import Store

POINTS = [
    {"trainer.depth": depth, "trainer.width": width}
    for depth, width in itertools.product((1, 2, 3), (16, 32))
]


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store, sampler="grid", space=sweeps.GRID, n_trials=len(POINTS))


def drawn(store: Store, sweep: Sweep) -> list[Params]:
    found = []
    while claim := sweeps.draw(store, sweep):
        found.append(claim.run.params)
    return found


def test_each_point_is_drawn_once_in_order(store: Store, sweep: Sweep) -> None:
    assert drawn(store, sweep) == POINTS
    assert Search(store, sweep).propose() is None


def test_more_trials_than_points_end_with_the_points(store: Store) -> None:
    sweep = sweeps.make(store, sampler="grid", space=sweeps.GRID, n_trials=100)
    assert drawn(store, sweep) == POINTS


def test_an_interrupted_point_is_not_lost_and_not_drawn_again(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    store.release(claim.lease, sweeps.PREEMPTED)
    assert drawn(store, sweep) == POINTS[1:]
    assert sweeps.must_claim(store, claim.run).run.params == POINTS[0]


def test_a_point_whose_run_starts_fresh_is_not_drawn_again(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    assert sweeps.supersede(store, sweep, claim).run.params == POINTS[0]
    assert drawn(store, sweep) == POINTS[1:]


def test_a_failed_point_stays_failed_until_it_is_retried_once(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    sweeps.fail(store, claim)
    assert drawn(store, sweep) == POINTS[1:]

    store.retry(claim.run.run_id)
    assert drawn(store, sweep) == [POINTS[0]]


def test_a_retried_point_comes_before_points_that_were_never_to_be_drawn(store: Store) -> None:
    sweep = sweeps.make(store, sampler="grid", space=sweeps.GRID, n_trials=2)
    first, _ = sweeps.must_draw(store, sweep), sweeps.must_draw(store, sweep)
    sweeps.fail(store, first)
    store.retry(first.run.run_id)
    assert drawn(store, sweep) == [POINTS[0]], "the retry has its slot, not the third point"


def test_a_retry_that_fails_can_be_retried(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    for _ in range(3):
        sweeps.fail(store, claim)
        store.retry(claim.run.run_id)
        retry = Search(store, sweep).propose()
        assert retry is not None
        assert (retry.params, retry.retry_of) == (POINTS[0], claim.run.run_id)
        claim = sweeps.must_draw(store, sweep)
    assert drawn(store, sweep) == POINTS[1:]


def draw_points(index: int, url: str) -> list[tuple[str, str]]:
    """Draw points; interrupt every third, and go on with what was interrupted."""
    store = Store(url)
    sweep, done = store.sweep("simple"), []
    search = Search(store, sweep)
    for count in itertools.count():
        claim = sweeps.draw(store, sweep, search=search)
        if claim is None:
            claim = store.claim(sweep.sweep_id, owner=sweeps.processes.identify(), worker=f"w:{index}")
        if claim is None:
            break
        if claim.is_new and count % 3 == 0:
            store.release(claim.lease, sweeps.PREEMPTED)
            continue
        sweeps.complete(store, claim)
        done.append((claim.run.run_id, json.dumps(claim.run.params)))
    store.close()
    return done


def test_8_processes_do_every_point_exactly_once(store: Store, url: str) -> None:
    space = {"trainer.depth": "range(1, 7)", "trainer.width": "choice(16, 32, 64, 128)"}
    sweep = sweeps.make(store, sampler="grid", space=space, n_trials=24)
    done = [item for part in sweeps.crowd(8, draw_points, url) for item in part]
    while claim := store.claim(sweep.sweep_id, owner=sweeps.processes.identify(), worker="last"):
        done.append((claim.run.run_id, json.dumps(claim.run.params)))  # released after all others had left

    every: list[dict[str, Any]] = [
        {"trainer.depth": depth, "trainer.width": width}
        for depth in range(1, 7)
        for width in (16, 32, 64, 128)
    ]
    assert Counter(params for _, params in done) == Counter(map(json.dumps, every))
    assert len({run_id for run_id, _ in done}) == 24
