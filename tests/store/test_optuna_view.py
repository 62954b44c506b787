"""The database is a valid Optuna study at all times, and what Optuna writes into it is taken up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import optuna
import pytest
import sweeps
from optuna.distributions import json_to_distribution
from optuna.trial import TrialState

from sweeper import processes
from sweeper.errors import StorageError
from sweeper.records import Ending, Sweep
from sweeper.search import Search
from sweeper.states import Outcome, State
from sweeper.store import Store


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store, n_trials=6)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_optuna_reads_trials_values_and_the_best_one(store: Store, direction: str) -> None:
    sweep = sweeps.make(store, n_trials=6, direction=direction)
    claims = [sweeps.must_draw(store, sweep) for _ in range(6)]
    for claim, value in zip(claims[:3], (0.5, 0.25, 0.75), strict=True):
        sweeps.complete(store, claim, value)
    store.settle(claims[3].lease, State.PRUNED, Ending(Outcome.PRUNED, "median", value=0.9))
    sweeps.fail(store, claims[4])

    study = optuna.load_study(study_name=sweep.name, storage=store.url)
    assert study.direction.name.lower() == direction
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["PRUNED", "FAIL", "RUNNING"]
    assert [trial.values for trial in study.trials] == [[0.5], [0.25], [0.75], [0.9], None, None]
    assert study.best_trial.number == (2 if direction == "maximize" else 1)
    for claim, trial in zip(claims, study.trials, strict=True):
        assert trial.number == claim.run.trial
        assert trial.params == claim.run.params
        assert trial.distributions == {k: json_to_distribution(v) for k, v in sweep.config["space"].items()}


def test_times_are_what_optuna_would_have_written(store: Store, sweep: Sweep) -> None:
    sweeps.complete(store, sweeps.must_draw(store, sweep))
    (trial,) = sweeps.study(store).trials
    theirs = optuna.create_study(study_name="theirs", storage=store.url)
    theirs.tell(theirs.ask(), 0.5)
    other = theirs.trials[0]
    assert trial.datetime_start is not None
    assert other.datetime_start is not None
    assert trial.datetime_complete is not None
    assert trial.datetime_start.tzinfo == other.datetime_start.tzinfo
    assert abs(trial.datetime_start - other.datetime_start) < timedelta(minutes=1)
    assert timedelta(0) <= trial.datetime_complete - trial.datetime_start < timedelta(minutes=1)
    stored = next(row for row in sweeps.rows(store, "trials") if row["trial_id"] == trial._trial_id)
    now = datetime.now(UTC).replace(tzinfo=None)
    assert abs(datetime.fromisoformat(str(stored["datetime_start"])) - now) < timedelta(minutes=1), "UTC"


def test_the_study_is_valid_at_every_moment_of_a_trials_life(store: Store) -> None:
    """Optuna's own samplers can go on with it after any of our transactions."""
    sweep = sweeps.make(store, sampler="tpe", pruner="halving", n_trials=6)

    def check() -> None:
        study = sweeps.study(store)
        trials = study.trials
        assert [trial.number for trial in trials] == list(range(len(trials)))
        for trial in trials:
            trial._validate()
        tpe = optuna.samplers.TPESampler(seed=1, n_startup_trials=0, constant_liar=False)
        tpe.sample_relative(study, trials[-1], trials[-1].distributions)

    for index in range(2):
        claim = sweeps.must_draw(store, sweep)
        check()
        prune, attrs = Search(store, sweep).judge(claim.run, step=1, value=float(index))
        store.report(claim.lease, claim.run, step=1, value=float(index), prune=prune, system_attrs=attrs)
        check()
        store.release(claim.lease, sweeps.CRASHED)
        check()
        claim = sweeps.supersede(store, sweep, sweeps.must_claim(store, claim.run))
        check()
        sweeps.complete(store, claim, float(index)) if index else sweeps.fail(store, claim)
        check()
    store.retry("simple.r.00001")
    check()


def test_a_waiting_grid_is_a_valid_study(store: Store) -> None:
    sweep = sweeps.make(store, sampler="grid", space=sweeps.GRID, n_trials=6)
    sweeps.must_draw(store, sweep)
    trials = sweeps.study(store).trials
    assert [trial.state for trial in trials] == [TrialState.RUNNING] + [TrialState.WAITING] * 5
    assert trials[1].params == {"trainer.depth": 1, "trainer.width": 32}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_completed_run_needs_a_number(store: Store, sweep: Sweep, value: float | None) -> None:
    claim = sweeps.must_draw(store, sweep)
    before = sweeps.everything(store)
    with pytest.raises(ValueError, match="number"):
        store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=value))
    assert sweeps.everything(store) == before


# --- what Optuna writes ------------------------------------------------------------------------


def test_an_enqueued_trial_is_drawn_next_with_its_parameters(store: Store, sweep: Sweep) -> None:
    params = {"trainer.lr": 0.002, "trainer.depth": 3, "trainer.width": 64}
    sweeps.must_draw(store, sweep)
    sweeps.study(store).enqueue_trial(params)
    claim = sweeps.must_draw(store, sweep)
    assert (claim.run.trial, claim.run.params) == (1, params)
    assert sweeps.must_draw(store, sweep).run.trial == 2
    assert sweeps.study(store).trials[1].params == params


def test_what_an_enqueued_trial_leaves_open_is_sampled(store: Store, sweep: Sweep) -> None:
    sweeps.study(store).enqueue_trial({"trainer.lr": 0.002})
    params = sweeps.must_draw(store, sweep).run.params
    assert params["trainer.lr"] == 0.002
    assert params["trainer.depth"] in (1, 2, 3, 4)
    assert params["trainer.width"] in (16, 32, 64)
    assert sweeps.study(store).trials[0].params == params


def test_an_enqueued_trial_needs_a_slot_like_any_other(store: Store) -> None:
    sweep = sweeps.make(store, n_trials=1)
    sweeps.must_draw(store, sweep)
    sweeps.study(store).enqueue_trial({"trainer.lr": 0.002})
    assert sweeps.draw(store, sweep) is None
    store.update_sweep(sweep.name, n_trials=2, config=sweep.config)
    assert sweeps.must_draw(store, sweep).run.params["trainer.lr"] == 0.002


def test_parameters_outside_the_space_are_left_out(store: Store, sweep: Sweep) -> None:
    sweeps.study(store).enqueue_trial({"trainer.lr": 0.002, "trainer.dropout": 0.5})
    assert set(sweeps.must_draw(store, sweep).run.params) == set(sweep.config["space"])


def test_a_value_that_is_no_choice_is_sampled_anew_instead_of_stopping_the_sweep(
    store: Store, sweep: Sweep
) -> None:
    sweeps.study(store).enqueue_trial({"trainer.lr": 0.002, "trainer.width": 17, "trainer.depth": "deep"})
    with pytest.warns(UserWarning, match=r"trial 0 waits with trainer\.(width=17|depth='deep'); sampled"):
        params = sweeps.must_draw(store, sweep).run.params
    assert params["trainer.lr"] == 0.002
    assert params["trainer.width"] in (16, 32, 64)
    assert params["trainer.depth"] in (1, 2, 3, 4)


def test_a_fixed_value_has_the_type_that_optuna_will_read(store: Store, sweep: Sweep) -> None:
    sweeps.study(store).enqueue_trial({"trainer.depth": 3.0, "trainer.lr": 1, "trainer.width": 32.0})
    params = sweeps.must_draw(store, sweep).run.params
    assert repr(params["trainer.depth"]) == "3"
    assert repr(params["trainer.lr"]) == "1.0"
    assert repr(params["trainer.width"]) == "32"


def test_a_running_trial_that_no_run_stands_behind_is_adopted(store: Store, sweep: Sweep) -> None:
    orphan = sweeps.study(store).ask()
    orphan.suggest_float("trainer.lr", 1e-4, 1e-1, log=True)
    assert store.adopt_orphans(sweep.sweep_id) == 1
    assert store.adopt_orphans(sweep.sweep_id) == 0
    claim = sweeps.must_draw(store, sweep)
    assert claim.run.trial == orphan.number
    assert claim.run.params["trainer.lr"] == orphan.params["trainer.lr"]
    assert set(claim.run.params) == set(sweep.config["space"])
    sweeps.complete(store, claim)
    assert sweeps.study(store).trials[0].state == TrialState.COMPLETE


@pytest.mark.parametrize("state", State)
def test_no_trial_with_a_run_is_ever_adopted(store: Store, sweep: Sweep, state: State) -> None:
    claim = sweeps.must_draw(store, sweep)
    if state is State.SUPERSEDED:
        sweeps.supersede(store, sweep, claim)
    elif state is State.INTERRUPTED:
        store.release(claim.lease, sweeps.PREEMPTED)
    elif state.is_final:
        store.settle(claim.lease, state, Ending(Outcome.COMPLETED, value=0.5))
    assert store.adopt_orphans(sweep.sweep_id) == 0


def test_trials_of_other_studies_are_left_alone(store: Store, sweep: Sweep) -> None:
    optuna.create_study(study_name="somebody's", storage=store.url).ask()
    assert store.adopt_orphans(sweep.sweep_id) == 0
    assert sweeps.must_draw(store, sweep).run.trial == 0


def test_a_study_that_is_not_ours_is_not_taken(store: Store) -> None:
    optuna.create_study(study_name="simple", storage=store.url)
    with pytest.raises(StorageError, match=r"study 'simple' that is not one of sweeper's.*sweep\.name="):
        store.create_sweep(sweeps.new())
    assert store.find_sweep("simple") is None


def test_a_sweeps_name_is_taken_once(store: Store, sweep: Sweep) -> None:
    assert not store.create_sweep(sweeps.new(n_trials=99))
    assert store.sweep(sweep.name) == sweep


def test_a_trial_that_somebody_else_finished_is_not_told_again(store: Store, sweep: Sweep) -> None:
    claim = sweeps.must_draw(store, sweep)
    sweeps.study(store).tell(claim.run.trial, 0.125)
    sweeps.complete(store, claim, 0.5)
    (trial,) = sweeps.study(store).trials
    assert trial.values == [0.125]


def test_a_trial_optuna_asks_for_in_between_takes_its_number(store: Store, sweep: Sweep) -> None:
    stale = Search(store, sweep).propose()
    assert stale is not None
    sweeps.study(store).ask()
    assert store.draw(sweep, stale, owner=processes.identify(), worker="w:0", threads=1) is None
    assert sweeps.must_draw(store, sweep).run.trial == 1
