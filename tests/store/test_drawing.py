"""`n_trials` is exact: with any number of workers, launches, retries and cancellations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import sweeps

from sweeper import processes
from sweeper.errors import NotFound, SweeperError
from sweeper.records import Claim, Sweep
from sweeper.search import Search
from sweeper.states import State
from sweeper.store import Store

N = 3


def left(store: Store, sweep: Sweep) -> int:
    return store.count_left(sweep.sweep_id)[0]


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store, n_trials=N)


ENDS: dict[str, tuple[Callable[[Store, Sweep, Claim], object], int]] = {
    "running": (lambda store, sweep, claim: None, 1),
    "interrupted": (lambda store, sweep, claim: store.release(claim.lease, sweeps.PREEMPTED), 1),
    "completed": (lambda store, sweep, claim: sweeps.complete(store, claim), 1),
    "pruned": (
        lambda store, sweep, claim: store.settle(claim.lease, State.PRUNED, sweeps.PREEMPTED),
        1,
    ),
    "failed": (lambda store, sweep, claim: sweeps.fail(store, claim), 1),
    "superseded, its next run open": (lambda store, sweep, claim: sweeps.supersede(store, sweep, claim), 1),
    "superseded, its next run done": (
        lambda store, sweep, claim: sweeps.complete(store, sweeps.supersede(store, sweep, claim)),
        1,
    ),
    "cancelled": (lambda store, sweep, claim: sweeps.cancel(store, claim), 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_counts_to_n_trials(store: Store, sweep: Sweep, end: str) -> None:
    act, counted = ENDS[end]
    act(store, sweep, sweeps.must_draw(store, sweep))
    assert left(store, sweep) == N - counted

    drawn = 0
    while sweeps.draw(store, sweep):
        drawn += 1
    assert drawn == N - counted


def test_a_retried_failure_gives_its_slot_to_the_retry(store: Store, sweep: Sweep) -> None:
    for _ in range(N):
        failed = sweeps.must_draw(store, sweep)
        sweeps.fail(store, failed)
    assert sweeps.draw(store, sweep) is None

    store.retry(failed.run.run_id)
    again = sweeps.must_draw(store, sweep)
    assert again.run.params == failed.run.params
    assert (again.run.trial, again.run.number, again.run.retry_of) == (N, N, failed.run.run_id)
    assert sweeps.draw(store, sweep) is None


@pytest.mark.parametrize("end", ["running", "interrupted", "completed", "pruned"])
def test_only_failed_and_cancelled_runs_can_be_retried(store: Store, sweep: Sweep, end: str) -> None:
    claim = sweeps.must_draw(store, sweep)
    ENDS[end][0](store, sweep, claim)
    with pytest.raises(SweeperError, match=f"cannot be retried: it is {end}"):
        store.retry(claim.run.run_id)


def test_a_run_is_retried_once(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    sweeps.fail(store, claim)
    store.retry(claim.run.run_id)
    with pytest.raises(SweeperError, match="it was retried before"):
        store.retry(claim.run.run_id)


def test_a_retry_of_an_unknown_run_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match=r"no run 'simple\.r\.00009'"):
        store.retry("simple.r.00009")


def test_a_cancelled_sweep_draws_nothing_until_it_is_launched_again(store: Store, sweep: Sweep) -> None:
    proposal = Search(store, sweep).propose()
    assert proposal is not None
    store.cancel_sweep(sweep.name)
    assert left(store, sweep) == 0
    assert store.draw(sweep, proposal, owner=processes.identify(), worker="w:0", threads=1) is None

    store.update_sweep(sweep.name, n_trials=N, config=sweep.config)
    assert left(store, sweep) == N
    assert sweeps.draw(store, sweep)


def test_raising_n_trials_extends_and_lowering_it_keeps_what_was_drawn(store: Store, sweep: Sweep) -> None:
    for _ in range(N):
        sweeps.complete(store, sweeps.must_draw(store, sweep))
    assert sweeps.draw(store, sweep) is None

    store.update_sweep(sweep.name, n_trials=N + 2, config=sweep.config)
    numbers = [sweeps.must_draw(store, sweep).run.number for _ in range(2)]
    assert numbers == [N, N + 1], "numbers continue"
    assert sweeps.draw(store, sweep) is None

    store.update_sweep(sweep.name, n_trials=1, config=sweep.config)
    assert left(store, sweep) == 0
    assert len(store.runs(sweep.sweep_id)) == N + 2


def test_the_last_slot_is_given_once_whoever_still_has_a_proposal(store: Store, sweep: Sweep) -> None:
    for _ in range(N):
        sweeps.must_draw(store, sweep)
    late = Search(store, sweep).propose()
    assert late is not None
    before = sweeps.everything(store)
    assert store.draw(sweep, late, owner=processes.identify(), worker="w:0", threads=1) is None
    assert sweeps.everything(store) == before


def test_a_stale_proposal_takes_no_slot(store: Store, sweep: Sweep) -> None:
    stale = Search(store, sweep).propose()
    assert stale is not None
    sweeps.must_draw(store, sweep)
    before = sweeps.everything(store)
    assert store.draw(sweep, stale, owner=processes.identify(), worker="w:0", threads=1) is None
    assert sweeps.everything(store) == before


def test_reserved_numbers_are_never_reused(store: Store, sweep: Sweep) -> None:
    assert store.reserve_number(sweep.sweep_id) == 0
    assert sweeps.must_draw(store, sweep).run.number == 1
    assert store.reserve_number(sweep.sweep_id) == 2


def test_the_seed_belongs_to_the_trial_not_to_the_run(store: Store, sweep: Sweep) -> None:
    first = sweeps.must_draw(store, sweep)
    fresh = sweeps.supersede(store, sweep, first)
    other = sweeps.must_draw(store, sweep)
    assert fresh.run.seed == first.run.seed
    assert fresh.run.run_id != first.run.run_id
    assert fresh.run.wandb_run_id != first.run.wandb_run_id
    assert other.run.seed != first.run.seed


# --- a crowd -----------------------------------------------------------------------------------

DRAWERS = 16


def draw_all(index: int, url: str, names: list[str]) -> list[tuple[str, int, int]]:
    """Draw and complete trials of several sweeps until none is left; what was drawn."""
    store = Store(url)
    drawn = []
    order = names if index % 2 else names[::-1]
    for name in order:
        sweep = store.sweep(name)
        search = Search(store, sweep)
        while claim := sweeps.draw(store, sweep, worker=f"w:{index}", search=search):
            drawn.append((name, claim.run.trial, claim.run.number))
            sweeps.complete(store, claim, value=float(claim.run.trial))
    store.close()
    return drawn


@pytest.mark.parametrize("sampler", ["random", pytest.param("grid", marks=pytest.mark.slow)])
def test_16_processes_and_two_sweeps_draw_exactly_n_trials_each(store: Store, url: str, sampler: str) -> None:
    totals = {"first": 25, "second": 15}
    space = {"trainer.depth": "range(1, 11)", "trainer.width": "choice(8, 16, 32, 64)"}
    for name, total in totals.items():
        sweeps.make(store, name, n_trials=total, sampler=sampler, space=space)

    drawn = [item for part in sweeps.crowd(DRAWERS, draw_all, url, list(totals)) for item in part]

    assert Counter(name for name, _, _ in drawn) == totals
    for name, total in totals.items():
        assert sorted(trial for who, trial, _ in drawn if who == name) == list(range(total))
        assert sorted(number for who, _, number in drawn if who == name) == list(range(total))
        assert store.count_left(store.sweep(name).sweep_id) == (0, 0)

    store.update_sweep(
        "first", n_trials=30 if sampler == "random" else 25, config=store.sweep("first").config
    )
    more = [item for part in sweeps.crowd(4, draw_all, url, list(totals)) for item in part]
    assert len(more) == (5 if sampler == "random" else 0), "a launch that comes later only extends"
