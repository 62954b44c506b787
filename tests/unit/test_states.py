"""The table of states is whole: what the design promises of it can be read from it."""

from __future__ import annotations

import pytest

from sweeper.states import (
    INCOMPLETE,
    OPTUNA_STATE,
    SETTLES,
    TRANSITIONS,
    Event,
    Outcome,
    State,
    source,
    target,
)


def test_incomplete_is_running_or_interrupted() -> None:
    assert {State.RUNNING, State.INTERRUPTED} == INCOMPLETE
    assert [state for state in State if not state.is_final] == [State.RUNNING, State.INTERRUPTED]


@pytest.mark.parametrize("event", Event)
def test_each_event_leaves_from_exactly_one_state(event: Event) -> None:
    assert (source(event), event) in TRANSITIONS
    assert target(event) is TRANSITIONS[source(event), event]


@pytest.mark.parametrize("state", [state for state in State if state.is_final])
def test_nobody_leaves_a_final_state(state: State) -> None:
    assert not [event for before, event in TRANSITIONS if before is state]


def test_every_state_can_be_reached() -> None:
    assert set(TRANSITIONS.values()) == set(State)


def test_each_final_state_but_superseded_is_settled_by_one_event() -> None:
    assert set(SETTLES) == {state for state in State if state.is_final} - {State.SUPERSEDED}
    assert all(target(event) is state for state, event in SETTLES.items())


def test_a_trial_lives_on_while_a_run_of_it_may() -> None:
    lives_on = {state for state in State if OPTUNA_STATE[state] == "RUNNING"}
    assert lives_on == INCOMPLETE | {State.SUPERSEDED}


def test_the_words_are_those_of_the_design() -> None:
    assert " ".join(State) == "running interrupted completed pruned failed superseded cancelled"
    assert " ".join(Outcome) == "completed pruned preempted timeout lost crashed oom fenced cancelled"
