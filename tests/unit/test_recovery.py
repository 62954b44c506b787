"""The decisions, on both sides of each of their boundaries."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from sweeper.records import Ending
from sweeper.recovery import MAX_BACK_OFF_S, Action, after, back_off_s, on_claim, signal_outcome
from sweeper.states import Outcome, State

RETRY = {"max_lost": 20, "max_crashed": 1, "max_oom": 0}


def decide(outcome: Outcome, count: int = 1, *, on_invalid: str = "fresh", **ending: Any) -> Any:
    return after(Ending(outcome, "why", **ending), count=count, retry=RETRY, on_invalid=on_invalid)


# --- after an attempt --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome.COMPLETED, State.COMPLETED),
        (Outcome.PRUNED, State.PRUNED),
        (Outcome.CANCELLED, State.CANCELLED),
    ],
)
def test_a_training_that_came_to_its_end_is_settled(outcome: Outcome, state: State) -> None:
    decision = decide(outcome)
    assert (decision.action, decision.state) == (Action.SETTLE, state)


@pytest.mark.parametrize(("outcome", "limit"), [(Outcome.LOST, 20), (Outcome.CRASHED, 1), (Outcome.OOM, 0)])
def test_a_budget_is_spent_by_the_attempt_beyond_it(outcome: Outcome, limit: int) -> None:
    assert decide(outcome, limit).action is Action.RELEASE
    spent = decide(outcome, limit + 1)
    assert (spent.action, spent.state) == (Action.SETTLE, State.FAILED)
    assert (
        spent.reason
        == f"{outcome} {limit + 1} times without a newer checkpoint (retry.max_{outcome}={limit}): why"
    )


@pytest.mark.parametrize("outcome", [Outcome.PREEMPTED, Outcome.TIMEOUT])
def test_preemption_and_time_outs_never_fail_a_run(outcome: Outcome) -> None:
    decision = decide(outcome, 10_000)
    assert (decision.action, decision.back_off_s) == (Action.RELEASE, 0.0)


def test_who_was_fenced_touches_nothing() -> None:
    assert decide(Outcome.FENCED, 10_000).action is Action.LEAVE
    assert decide(Outcome.FENCED, no_checkpoint=True).action is Action.LEAVE


def test_without_a_good_checkpoint_a_fresh_run_starts_or_the_run_fails_as_configured() -> None:
    fresh = decide(Outcome.CRASHED, 10_000, no_checkpoint=True)
    assert fresh.action is Action.SUPERSEDE
    failed = decide(Outcome.CRASHED, no_checkpoint=True, on_invalid="fail")
    assert (failed.action, failed.state) == (Action.SETTLE, State.FAILED)
    assert failed.reason == "why (resume.on_invalid=fail)"


@pytest.mark.parametrize("outcome", sorted(set(Outcome) - {Outcome.FENCED}))
def test_every_decision_says_why(outcome: Outcome) -> None:
    assert "why" in decide(outcome).reason


# --- backing off -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "seconds"), [(1, 0), (3, 0), (4, 1), (5, 2), (6, 4), (7, 8), (8, 16), (9, 30), (10_000, 30)]
)
def test_three_losses_are_free_then_the_wait_doubles_to_30_s(count: int, seconds: float) -> None:
    assert back_off_s(count) == seconds
    assert seconds <= MAX_BACK_OFF_S


def test_only_losses_back_off() -> None:
    assert decide(Outcome.LOST, 4).back_off_s == 1.0
    assert (
        after(Ending(Outcome.CRASHED), count=4, retry={"max_crashed": 9}, on_invalid="fresh").back_off_s
        == 0.0
    )


# --- at a claim --------------------------------------------------------------------------------


def claim(result: dict[str, Any] | None = None, *, mode: str = "auto", is_new: bool = False) -> Any:
    return on_claim(claimed_epoch=5, result=result, mode=mode, is_new=is_new)


@pytest.mark.parametrize("state", [State.COMPLETED, State.PRUNED, State.FAILED, State.CANCELLED])
def test_the_result_of_the_owner_just_before_is_adopted(state: State) -> None:
    decision = claim({"state": str(state), "lease_epoch": 4, "value": 0.5})
    assert (decision.action, decision.state) == (Action.ADOPT, state)


@pytest.mark.parametrize("epoch", [0, 3, 5, 6, "4", None])
def test_a_result_of_any_other_owner_does_not_count(epoch: object) -> None:
    assert claim({"state": "completed", "lease_epoch": epoch, "value": 0.5}).action is Action.TRAIN


@pytest.mark.parametrize("state", ["running", "interrupted", "superseded", "done", None, 7])
def test_a_result_without_a_final_state_does_not_count(state: object) -> None:
    assert claim({"state": state, "lease_epoch": 4, "value": 0.5}).action is Action.TRAIN


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), float("inf"), 10**400, True, [0.5]])
def test_a_completed_result_without_a_number_does_not_count(value: object) -> None:
    assert claim({"state": "completed", "lease_epoch": 4, "value": value}).action is Action.TRAIN


@pytest.mark.parametrize("value", [None, 0.5, 1, float("nan"), float("inf")])
def test_a_pruned_result_may_be_without_a_value(value: object) -> None:
    assert claim({"state": "pruned", "lease_epoch": 4, "value": value}).action is Action.ADOPT


@pytest.mark.parametrize("value", ["0.5", 10**400, {}])
def test_a_result_of_nonsense_does_not_count(value: object) -> None:
    assert claim({"state": "pruned", "lease_epoch": 4, "value": value}).action is Action.TRAIN


def test_resume_mode_never_supersedes_what_is_incomplete_but_not_what_is_new() -> None:
    assert claim(mode="never").action is Action.SUPERSEDE
    assert claim(mode="never", is_new=True).action is Action.TRAIN
    assert claim({"state": "completed", "lease_epoch": 4, "value": 1.0}, mode="never").action is Action.ADOPT


@pytest.mark.parametrize("mode", ["auto", "must"])
def test_an_incomplete_run_is_trained_on(mode: str) -> None:
    assert claim(mode=mode).action is Action.TRAIN


# --- how a trainer died ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS"])
def test_a_signal_a_process_brings_on_itself_is_a_crash(name: str) -> None:
    assert signal_outcome(signal.Signals[name], was_oom_killed=False) is Outcome.CRASHED


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGPIPE"])
def test_a_signal_from_somebody_else_is_a_loss(name: str) -> None:
    assert signal_outcome(signal.Signals[name], was_oom_killed=False) is Outcome.LOST


def test_only_the_kernels_own_word_makes_a_kill_out_of_memory() -> None:
    assert signal_outcome(signal.SIGKILL, was_oom_killed=True) is Outcome.OOM
