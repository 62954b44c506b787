"""Which checkpoints are kept: a pure decision."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keep:
    """The rules; what any of them keeps stays.

    Attributes:
        last: The newest so many, at least 2.
        best: The best so many by their value.
        every: The first at or after each multiple of it, for ever; 0: none. A save beside the training
            may begin some steps late, so that no step need be a multiple itself.
        direction: Of the value, `minimize` or `maximize`.
    """

    last: int = 3
    best: int = 0
    every: int = 0
    direction: str = "minimize"


@dataclass(frozen=True, slots=True)
class Kept:
    """A valid checkpoint, as the rules see it."""

    step: int
    value: float | None = None
    is_pinned: bool = False


def doomed(steps: Collection[int], good: Sequence[Kept], rules: Keep) -> set[int]:
    """The steps that may go: older than the newest `last` good ones, and kept by no other rule.

    Args:
        steps: All checkpoints there are, damaged ones included.
        good: The valid ones among them.
    """
    newest = sorted((kept.step for kept in good), reverse=True)[: max(2, rules.last)]
    if len(newest) < max(2, rules.last):
        return set()
    sign = 1.0 if rules.direction == "minimize" else -1.0
    # Of equal values the earlier one stays.
    ranked = sorted((sign * kept.value, kept.step) for kept in good if kept.value is not None)
    best = {step for _, step in ranked[: rules.best]}
    pinned = {kept.step for kept in good if kept.is_pinned}
    kept_for_ever = _firsts([kept.step for kept in good], rules.every)
    return {step for step in steps if step < newest[-1]} - best - pinned - kept_for_ever


def _firsts(steps: Collection[int], every: int) -> set[int]:
    """The first step in each of `[every, 2·every)`, `[2·every, 3·every)`, …."""
    if not every:
        return set()
    by_span: dict[int, int] = {}
    for step in sorted(steps):
        by_span.setdefault(step // every, step)
    return set(by_span.values()) - {by_span.get(0)}
