"""Pure decisions: what to do with what was found, and why. Nothing here acts.

Every function returns the decision together with its reason; the worker logs the reason, then
does it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sweeper.records import Ending
from sweeper.states import Outcome, State

FREE_LOSSES = 3
MAX_BACK_OFF_S = 30.0
MAX_FLOAT = sys.float_info.max


class Action(StrEnum):
    """What a worker does next with a run it owns."""

    TRAIN = "train"  # start a trainer; it resumes from the newest valid checkpoint, or at step 0
    ADOPT = "adopt"  # a result is on disk already: finish what the last owner began
    SUPERSEDE = "supersede"  # a fresh run takes over the trial
    SETTLE = "settle"
    RELEASE = "release"
    LEAVE = "leave"  # fenced: touch nothing


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, why, and with which details.

    Attributes:
        state: The final state, for SETTLE and ADOPT.
        back_off_s: Seconds before anybody may claim the run again, for RELEASE.
    """

    action: Action
    reason: str
    state: State | None = None
    back_off_s: float = 0.0


def on_claim(*, claimed_epoch: int, result: Mapping[str, Any] | None, mode: str, is_new: bool) -> Decision:
    """What to do with a run just claimed.

    Args:
        claimed_epoch: The lease epoch the claim gave, before it was raised above the disk's.
        result: result.json as found, or None.
        mode: `resume.mode`: auto, must or never.
        is_new: The run was drawn just now.
    """
    if result is not None:
        state = final_state(result)
        if state is not None and result.get("lease_epoch") == claimed_epoch - 1:
            return Decision(Action.ADOPT, f"its last owner had written the result ({state})", state=state)
    if mode == "never" and not is_new:
        return Decision(Action.SUPERSEDE, "resume.mode=never")
    return Decision(Action.TRAIN, "new" if is_new else "incomplete")


def final_state(result: Mapping[str, Any]) -> State | None:
    """The final state that a result.json tells of; None when it tells of none, or contradicts itself."""
    try:
        state = State(str(result.get("state")))
    except ValueError:
        return None
    if not state.is_final or state is State.SUPERSEDED:
        return None
    value: Any = result.get("value")
    if type(value) in (int, float) and abs(value) <= MAX_FLOAT:
        return state
    # A pruned training may have reported nothing yet, or NaN.
    return state if state is not State.COMPLETED and (value is None or type(value) is float) else None


def after(ending: Ending, *, count: int, retry: Mapping[str, Any], on_invalid: str) -> Decision:
    """What to do with a run when an attempt of it has ended.

    Args:
        ending: How it ended.
        count: Consecutive attempts of this outcome without a newer committed checkpoint,
            this one included.
        retry: The `retry` group: max_lost, max_crashed, max_oom.
        on_invalid: `resume.on_invalid`: fresh or fail.
    """
    outcome = ending.outcome
    if outcome is Outcome.FENCED:
        return Decision(Action.LEAVE, ending.reason)
    if ending.no_checkpoint:
        if on_invalid == "fail":
            return Decision(Action.SETTLE, f"{ending.reason} (resume.on_invalid=fail)", state=State.FAILED)
        return Decision(Action.SUPERSEDE, ending.reason)
    if outcome in (Outcome.COMPLETED, Outcome.PRUNED, Outcome.CANCELLED):
        return Decision(Action.SETTLE, ending.reason, state=State(str(outcome)))
    if outcome in (Outcome.PREEMPTED, Outcome.TIMEOUT):
        return Decision(Action.RELEASE, ending.reason)
    if ending.is_hopeless:
        return Decision(Action.SETTLE, ending.reason, state=State.FAILED)
    if ending.is_disk_fault:  # the run did nothing wrong, and the next one would fare no better
        return Decision(Action.RELEASE, ending.reason, back_off_s=MAX_BACK_OFF_S)
    limit = int(retry[f"max_{outcome}"])
    if count > limit:
        text = f"{outcome} {count} times without a newer checkpoint (retry.max_{outcome}={limit}): {ending.reason}"
        return Decision(Action.SETTLE, text, state=State.FAILED)
    return Decision(
        Action.RELEASE, ending.reason, back_off_s=back_off_s(count) if outcome is Outcome.LOST else 0.0
    )


def back_off_s(count: int) -> float:
    """Seconds before loss number `count` may be tried again: none for three, then 1, 2, 4, … 30."""
    doublings = min(count - FREE_LOSSES - 1, 10)
    return 0.0 if count <= FREE_LOSSES else min(MAX_BACK_OFF_S, 2.0**doublings)


def signal_outcome(signal_number: int, *, was_oom_killed: bool) -> Outcome:
    """Outcome of a trainer that died of a signal: the kernel's OOM killer, somebody else, itself."""
    if was_oom_killed:
        return Outcome.OOM
    crashes = {4, 6, 7, 8, 11, 31}  # ILL, ABRT, BUS, FPE, SEGV, SYS
    return Outcome.CRASHED if signal_number in crashes else Outcome.LOST
