"""One owner per run, with any number of processes at once, and nobody ever sees "locked"."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import sweeps

from sweeper import processes
from sweeper.database import BUSY_TIMEOUT_S, create_database
from sweeper.search import Search
from sweeper.states import State
from sweeper.store import Store

PROCESSES = 64
RUNS = 200


def claim_all(index: int, url: str) -> tuple[list[tuple[str, int]], float]:
    """Claim runs until none is left, trying now and then to take over what others own."""
    store = Store(url)
    sweep = store.sweep("simple")
    me = processes.identify()
    mine, longest = [], 0.0
    while True:
        started = time.monotonic()
        claim = store.claim(sweep.sweep_id, owner=me, worker=f"w:{index}")
        longest = max(longest, time.monotonic() - started)
        if claim is None:
            break
        mine.append((claim.run.run_id, claim.lease.lease_epoch))
        store.renew(claim.lease)
        store.check(claim.lease)
    store.close()
    return mine, longest


@pytest.mark.slow
def test_64_processes_claim_each_of_200_runs_exactly_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweeper.db'}"  # on a real disk
    create_database(url)
    store = Store(url)
    sweep = sweeps.make(store, n_trials=RUNS)
    search = Search(store, sweep)
    for _ in range(RUNS):
        store.release(sweeps.must_draw(store, sweep, search=search).lease, sweeps.PREEMPTED)

    answers = sweeps.crowd(PROCESSES, claim_all, url)

    claims = [claim for mine, _ in answers for claim in mine]
    assert Counter(run_id for run_id, _ in claims) == Counter(
        run.run_id for run in store.runs(sweep.sweep_id)
    )
    assert {epoch for _, epoch in claims} == {2}
    assert {run.state for run in store.runs(sweep.sweep_id)} == {State.RUNNING}
    assert max(longest for _, longest in answers) < BUSY_TIMEOUT_S / 2


def race(index: int, url: str) -> list[str]:
    """Take over every run that was running when all began."""
    store = Store(url)
    sweep = store.sweep("simple")
    me = processes.identify()
    won = [
        seen.run_id
        for seen in store.suspects(sweep.sweep_id)
        if seen.lease_epoch == 1 and store.take_over(seen, owner=me, worker=f"w:{index}", reason="gone")
    ]
    store.close()
    return won


def test_8_observers_take_over_each_dead_run_once(store: Store, url: str) -> None:
    sweep = sweeps.make(store, n_trials=20)
    for _ in range(20):
        sweeps.must_draw(store, sweep)
    won = [run_id for part in sweeps.crowd(8, race, url) for run_id in part]
    assert sorted(won) == [run.run_id for run in store.runs(sweep.sweep_id)]
    assert {run.lease_epoch for run in store.runs(sweep.sweep_id)} == {2}


def come_and_go(index: int, url: str) -> int:
    """Open the database, draw, close it, again and again: WAL files come and go beneath."""
    drawn = 0
    for _ in range(10):
        store = Store(url)
        claim = sweeps.draw(store, store.sweep("simple"))
        store.close()
        drawn += claim is not None
    return drawn


@pytest.mark.slow
def test_opening_and_closing_all_the_time_is_never_locked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweeper.db'}"
    create_database(url)
    store = Store(url)
    sweeps.make(store, n_trials=100)
    store.close()  # so that the last of the crowd to close removes the WAL
    assert sum(sweeps.crowd(16, come_and_go, url)) == 100


def create(index: int, url: str) -> bool:
    create_database(url)
    store = Store(url)
    created = store.create_sweep(sweeps.new())
    store.close()
    return created


@pytest.mark.slow
def test_a_database_created_by_many_at_once_is_created_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'sweeper.db'}"
    assert sum(sweeps.crowd(8, create, url)) == 1
    assert Store(url).sweep("simple").n_trials == 10
