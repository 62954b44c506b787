"""Verdicts of pruners: Optuna's own, stored with the report, never asked for twice."""

from __future__ import annotations

import math
import random
from typing import Any

import optuna
import pytest
import sweeps
from optuna.distributions import json_to_distribution

from sweeper import optuna_rows
from sweeper.records import Claim, Ending, Sweep
from sweeper.search import Search, make
from sweeper.states import Outcome, State
from sweeper.store import Store

PRUNERS: dict[str, dict[str, Any]] = {
    "median": sweeps.PRUNERS["median"],
    "median, maximized": sweeps.PRUNERS["median"],
    "halving": sweeps.PRUNERS["halving"],
    "halving, maximized": sweeps.PRUNERS["halving"],
    "halving by 4": {**sweeps.PRUNERS["halving"], "reduction_factor": 4},
    "halving with min_resource=auto": {**sweeps.PRUNERS["halving"], "min_resource": "auto"},
    "hyperband": {
        "_target_": "optuna.pruners.HyperbandPruner",
        "min_resource": 1,
        "max_resource": 8,
        "reduction_factor": 2,
    },
    "patient": {
        "_target_": "optuna.pruners.PatientPruner",
        "wrapped_pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2},
        "patience": 1,
    },
}


def report(store: Store, search: Search, claim: Claim, *, step: int, value: float) -> bool:
    """What a worker does with a report: the stored verdict, else the pruner's, stored with it."""
    stored = store.verdict(claim.run.trial_id, step)
    if stored is not None:
        return stored
    prune, attrs = search.judge(claim.run, step=step, value=value)
    store.report(claim.lease, claim.run, step=step, value=value, prune=prune, system_attrs=attrs)
    return prune


class Vanilla:
    """The same study kept by Optuna alone, in memory."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._storage = optuna.storages.InMemoryStorage()
        optuna.create_study(storage=self._storage, study_name=sweep.name, direction=sweep.direction)
        self._open: dict[int, optuna.Trial] = {}

    def _study(self) -> optuna.Study:
        pruner = make(self._sweep.config["pruner"], kind="pruner")  # halving remembers an estimate
        return optuna.load_study(study_name=self._sweep.name, storage=self._storage, pruner=pruner)

    def ask(self, claim: Claim) -> None:
        space = {k: json_to_distribution(text) for k, text in self._sweep.config["space"].items()}
        study = self._study()
        study.enqueue_trial(claim.run.params)
        self._open[claim.run.trial] = study.ask(space)  # type: ignore[arg-type]

    def report(self, claim: Claim, *, step: int, value: float) -> bool:
        trial = self._open[claim.run.trial]
        trial.report(value, step)
        trial.study = self._study()
        return trial.should_prune()

    def tell(self, claim: Claim, state: str, value: float | None) -> None:
        trial = self._open.pop(claim.run.trial)
        if state == "PRUNED":
            self._study().tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study().tell(trial, value)


def curve(trial: int, step: int, *, sign: float = 1.0) -> float:
    noise = random.Random(f"{trial}:{step}").random()
    level = random.Random(trial).random()
    return sign * (level + 0.3 * noise) / math.sqrt(step)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", PRUNERS)
def test_every_verdict_is_optunas_own(store: Store, name: str) -> None:
    direction = "maximize" if "maximized" in name else "minimize"
    sign = -1.0 if direction == "maximize" else 1.0
    sweep = sweeps.make(store, pruner=PRUNERS[name], n_trials=12, direction=direction)
    search, vanilla = Search(store, sweep), Vanilla(sweep)
    verdicts = []
    for _ in range(3):  # four workers, their trials in step
        claims = [sweeps.must_draw(store, sweep, search=search) for _ in range(4)]
        for claim in claims:
            vanilla.ask(claim)
        for step in range(1, 9):
            for claim in list(claims):
                value = curve(claim.run.trial, step, sign=sign)
                ours = report(store, search, claim, step=step, value=value)
                assert ours == vanilla.report(claim, step=step, value=value), (claim.run.trial, step)
                verdicts.append(ours)
                if ours:
                    store.settle(claim.lease, State.PRUNED, Ending(Outcome.PRUNED, value=value))
                    vanilla.tell(claim, "PRUNED", value)
                    claims.remove(claim)
        for claim in claims:
            sweeps.complete(store, claim, curve(claim.run.trial, 8, sign=sign))
            vanilla.tell(claim, "COMPLETE", curve(claim.run.trial, 8, sign=sign))
    assert set(verdicts) == {True, False}, "the curves must give it something to do"
    assert same_trials(store, sweep, vanilla)


def same_trials(store: Store, sweep: Sweep, vanilla: Vanilla) -> bool:
    """Optuna reads the same trials, rungs included, from our database as from its own."""
    ours = sweeps.study(store).trials
    theirs = vanilla._study().trials
    keys = ("number", "state", "values", "params", "distributions", "intermediate_values")
    for mine, other in zip(ours, theirs, strict=True):
        rungs = {k: v for k, v in other.system_attrs.items() if k.startswith("completed_rung")}
        assert mine.system_attrs == rungs
        assert [getattr(mine, key) for key in keys] == [getattr(other, key) for key in keys]
    return True


def test_verdict_report_and_rungs_are_one_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweeps.make(store, pruner="halving")
    search, claim = Search(store, sweep), sweeps.must_draw(store, sweep)
    before = sweeps.everything(store)

    def broken(*args: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(optuna_rows, "insert_attrs", broken)
    with pytest.raises(ZeroDivisionError):
        report(store, search, claim, step=1, value=0.5)
    assert sweeps.everything(store) == before


def test_a_step_is_judged_once_and_its_verdict_never_changes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweeps.make(store, pruner="halving")
    asked: list[int] = []
    monkeypatch.setattr(Search, "judge", lambda self, run, *, step, value: (asked.append(step) or True, {}))
    claim, search = sweeps.must_draw(store, sweep), Search(store, sweep)
    assert store.verdict(claim.run.trial_id, 1) is None
    assert report(store, search, claim, step=1, value=0.5)
    assert report(store, search, claim, step=1, value=0.1), "a replay, whatever it reports"
    assert asked == [1]

    store.report(claim.lease, claim.run, step=1, value=0.1, prune=False, system_attrs={})
    assert store.verdict(claim.run.trial_id, 1) is True
    (row,) = sweeps.rows(store, "trial_intermediate_values")
    assert row["intermediate_value"] == 0.5, "nor does the value"


def test_steps_replayed_after_a_resume_get_the_stored_verdicts(store: Store) -> None:
    """A trial interrupted and resumed from step 0 is judged as if nothing had happened."""
    sweep = sweeps.make(store, pruner="halving", n_trials=8)
    for level in (0.1, 0.2, 0.3):
        claim = sweeps.must_draw(store, sweep)
        search = Search(store, sweep)
        for step in range(1, 5):
            report(store, search, claim, step=step, value=level / step)
        sweeps.complete(store, claim, level)

    claim = sweeps.must_draw(store, sweep)
    search = Search(store, sweep)
    first = [report(store, search, claim, step=step, value=0.05 / step) for step in (1, 2, 3)]
    store.release(claim.lease, sweeps.PREEMPTED)
    before = {
        k: v for k, v in sweeps.everything(store).items() if k not in ("sweeper_run", "sweeper_attempt")
    }

    again = sweeps.must_claim(store, claim.run)
    replayed = [
        report(store, Search(store, sweep), again, step=step, value=0.05 / step) for step in (1, 2, 3)
    ]
    after = {k: v for k, v in sweeps.everything(store).items() if k not in ("sweeper_run", "sweeper_attempt")}
    assert first == replayed == [False, False, False]
    assert before == after, "no rung was written twice"


def test_a_fresh_run_of_a_trial_replays_its_verdicts(store: Store) -> None:
    sweep = sweeps.make(store, pruner="median")
    claim = sweeps.must_draw(store, sweep)
    store.report(claim.lease, claim.run, step=1, value=0.5, prune=True, system_attrs={})
    fresh = sweeps.supersede(store, sweep, claim)
    assert store.verdict(fresh.run.trial_id, 1) is True


def test_without_a_pruner_nothing_is_read_or_remembered(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweeps.make(store, pruner="none")
    claim, search = sweeps.must_draw(store, sweep), Search(store, sweep)
    monkeypatch.setattr(store, "trials", lambda *args, **more: pytest.fail("it looked at the study"))
    assert search.judge(claim.run, step=1, value=0.5) == (False, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_report_that_is_no_finite_number_leaves_a_valid_study(
    store: Store, pruner: str, value: float
) -> None:
    sweep = sweeps.make(store, pruner=pruner)
    claim, search = sweeps.must_draw(store, sweep), Search(store, sweep)
    report(store, search, claim, step=1, value=value)
    store.settle(claim.lease, State.PRUNED, Ending(Outcome.PRUNED, "so", value=value))
    (trial,) = sweeps.study(store).trials
    assert repr(trial.intermediate_values[1]) == repr(value)
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert trial.values == (None if math.isnan(value) else [value])
