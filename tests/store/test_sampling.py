"""The parameters of trial k depend on the seed, k and the results known: on no process, order or number of workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import sweeps
from optuna.distributions import json_to_distribution

from sweeper.records import Params, Sweep
from sweeper.search import Search
from sweeper.states import State
from sweeper.store import Store

N = 12


def score(params: Params) -> float:
    """A result that is the same wherever and whenever a trial is trained."""
    return abs(float(params["trainer.lr"]) - 0.01) + float(params["trainer.depth"]) / float(
        params["trainer.width"]
    )


def run_alone(store: Store, sweep: Sweep) -> dict[int, Params]:
    """One worker with one Search from beginning to end."""
    search, drawn = Search(store, sweep), {}
    while claim := sweeps.draw(store, sweep, search=search):
        drawn[claim.run.trial] = claim.run.params
        sweeps.complete(store, claim, score(claim.run.params))
    return drawn


def run_restarted(store: Store, sweep: Sweep) -> dict[int, Params]:
    """A new worker for each trial."""
    drawn = {}
    while claim := sweeps.draw(store, sweep):
        drawn[claim.run.trial] = claim.run.params
        sweeps.complete(store, claim, score(claim.run.params))
    return drawn


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_two_databases_with_the_same_results_draw_the_same(
    store: Store, other_store: Store, sampler: str
) -> None:
    alone = run_alone(store, sweeps.make(store, sampler=sampler, n_trials=N, seed=7))
    restarted = run_restarted(other_store, sweeps.make(other_store, sampler=sampler, n_trials=N, seed=7))
    assert len(alone) == N
    assert alone == restarted


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_another_seed_draws_something_else(store: Store, sampler: str) -> None:
    one = run_alone(store, sweeps.make(store, "one", sampler=sampler, n_trials=4, seed=1))
    two = run_alone(store, sweeps.make(store, "two", sampler=sampler, n_trials=4, seed=2))
    assert not [k for k in one if one[k] == two[k]]
    assert len({json.dumps(params) for params in one.values()}) == 4, "nor is trial 1 what trial 0 was"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_name_of_the_sweep_and_its_neighbours_do_not_matter(store: Store, sampler: str) -> None:
    one = run_alone(store, sweeps.make(store, "one", sampler=sampler, n_trials=6, seed=3))
    two = run_alone(store, sweeps.make(store, "two", sampler=sampler, n_trials=6, seed=3))
    assert one == two


def test_trials_that_still_run_do_not_change_what_tpe_draws(store: Store, other_store: Store) -> None:
    """With w workers, trial k is drawn while w - 1 others run; their parameters must not matter."""
    fast, slow = (sweeps.make(s, sampler="tpe", n_trials=N) for s in (store, other_store))
    done = []
    for _ in range(6):
        claim = sweeps.must_draw(store, fast)
        sweeps.complete(store, claim, score(claim.run.params))
        done.append(claim.run.params)
    next_alone = [sweeps.must_draw(store, fast).run.params for _ in range(2)]

    open_claims = [sweeps.must_draw(other_store, slow) for _ in range(3)]  # three start together
    for claim in open_claims:
        sweeps.complete(other_store, claim, score(claim.run.params))
    for _ in range(3):
        claim = sweeps.must_draw(other_store, slow)
        sweeps.complete(other_store, claim, score(claim.run.params))
    with_others = [sweeps.must_draw(other_store, slow).run.params for _ in range(2)]

    assert next_alone == with_others


def test_tpe_learns_from_what_others_finished(store: Store, other_store: Store) -> None:
    good, bad = (sweeps.make(s, sampler="tpe", n_trials=N) for s in (store, other_store))
    search = Search(store, good)
    for s, sweep, sign in ((store, good, 1.0), (other_store, bad, -1.0)):
        for _ in range(8):
            claim = sweeps.must_draw(s, sweep, search=search if s is store else None)
            sweeps.complete(s, claim, sign * float(claim.run.trial))
    assert sweeps.must_draw(store, good).run.params != sweeps.must_draw(other_store, bad).run.params


@pytest.mark.parametrize("end", ["failed", "cancelled", "pruned", "interrupted"])
def test_one_long_lived_search_sees_what_a_new_one_sees(store: Store, end: str) -> None:
    sweep = sweeps.make(store, sampler="tpe", n_trials=N)
    old = Search(store, sweep)
    for index in range(8):
        claim = sweeps.must_draw(store, sweep, search=old)
        if index % 3:
            sweeps.complete(store, claim, score(claim.run.params))
        elif end == "interrupted":
            store.release(claim.lease, sweeps.PREEMPTED)
        else:
            store.settle(claim.lease, State(end), sweeps.PREEMPTED)
    late, new = old.propose(), Search(store, sweep).propose()
    assert late is not None
    assert late == new


def test_a_parameter_with_one_value_is_that_value(store: Store) -> None:
    space = {"trainer.lr": "choice(0.5)", "trainer.depth": "range(3, 4)", "trainer.width": "interval(2, 2)"}
    for sampler in ("random", "tpe"):
        sweep = sweeps.make(store, sampler, sampler=sampler, space=space, n_trials=4)
        for params in run_like(store, sweep, 4):
            assert params == {"trainer.depth": 3, "trainer.lr": 0.5, "trainer.width": 2.0}


def run_like(store: Store, sweep: Sweep, count: int) -> list[Params]:
    drawn = []
    for _ in range(count):
        claim = sweeps.must_draw(store, sweep)
        sweeps.complete(store, claim, float(claim.run.trial))
        drawn.append(claim.run.params)
    return drawn


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_without_parameters_repeats_the_training_with_other_seeds(store: Store, sampler: str) -> None:
    sweep = sweeps.make(store, sampler=sampler, space={}, n_trials=3)
    claims = [sweeps.must_draw(store, sweep) for _ in range(3)]
    assert [claim.run.params for claim in claims] == [{}, {}, {}]
    assert len({claim.run.seed for claim in claims}) == 3


def inside(params: Params, sweep: Sweep) -> bool:
    space: dict[str, str] = sweep.config["space"]
    return set(params) == set(space) and all(
        (d := json_to_distribution(space[name]))._contains(d.to_internal_repr(value))  # type: ignore[no-untyped-call]
        for name, value in params.items()
    )


CLASSES: dict[str, dict[str, Any]] = {
    "TPE of single parameters": {"_target_": "optuna.samplers.TPESampler", "multivariate": False},
    "TPE of groups": {"_target_": "optuna.samplers.TPESampler", "multivariate": True, "group": True},
    "NSGA-II": {"_target_": "optuna.samplers.NSGAIISampler", "population_size": 4},
    "brute force": {"_target_": "optuna.samplers.BruteForceSampler"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_optunas_other_samplers_draw_from_the_space_and_reproducibly(
    store: Store, other_store: Store, name: str
) -> None:
    config = {"n_startup_trials": 3, "constant_liar": False} if "TPE" in name else {}
    space = {
        "trainer.depth": "range(1, 5)",
        "trainer.width": "choice(16, 32, 64)",
        "trainer.lr": "range(0.1, 0.5, 0.1)",
    }
    drawn = []
    for s in (store, other_store):
        sweep = sweeps.make(s, sampler={**CLASSES[name], **config}, space=space, n_trials=N)
        drawn.append(run_like(s, sweep, N))
    assert drawn[0] == drawn[1]
    assert all(inside(params, sweep) for params in drawn[0])
    assert len({json.dumps(params) for params in drawn[0]}) > N / 2
    if name == "brute force":
        assert len({json.dumps(params) for params in drawn[0]}) == N, "each point once"


def test_tpe_of_single_parameters_is_what_was_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count_calls(monkeypatch, optuna.samplers.TPESampler, "sample_independent")
    sampler = {**CLASSES["TPE of single parameters"], "n_startup_trials": 2, "constant_liar": False}
    sweep = sweeps.make(store, sampler=sampler, n_trials=N)
    run_like(store, sweep, 4)
    asked.clear()
    sweeps.must_draw(store, sweep)
    assert len(asked) == 3, "one question for each parameter, none for all together"


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    calls: list[str] = []
    real: Callable[..., Any] = getattr(owner, name)

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(name)
        return real(*args, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


# --- other processes ---------------------------------------------------------------------------


def draw_some(index: int, url: str) -> dict[int, Params]:
    store = Store(url)
    sweep, drawn = store.sweep("simple"), {}
    search = Search(store, sweep)
    while claim := sweeps.draw(store, sweep, search=search):
        drawn[claim.run.trial] = claim.run.params
        sweeps.complete(store, claim, score(claim.run.params))
    store.close()
    return drawn


def test_random_draws_the_same_with_four_workers_as_with_one(
    store: Store, other_store: Store, url: str
) -> None:
    alone = run_alone(other_store, sweeps.make(other_store, n_trials=16))
    sweeps.make(store, n_trials=16)
    parts = sweeps.crowd(4, draw_some, url)
    assert {k: v for part in parts for k, v in part.items()} == alone
