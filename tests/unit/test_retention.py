"""Which checkpoints are kept, whatever comes and in whatever order."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sweeper import checkpoints, manifests
from sweeper.checkpoints import Draft
from sweeper.retention import Keep, Kept, doomed

RUN = "keep.r.00000"


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[int], list[Kept], Keep]:
    steps = sorted(draw(st.sets(st.integers(1, 60), max_size=20)))
    good = [
        Kept(step, draw(st.none() | st.floats(-5, 5)), draw(st.booleans()))
        for step in steps
        if draw(st.integers(0, 4))  # one in five is damaged
    ]
    rules = Keep(
        last=draw(st.integers(0, 5)),
        best=draw(st.integers(0, 3)),
        every=draw(st.sampled_from([0, 1, 7, 20])),
        direction=draw(st.sampled_from(["minimize", "maximize"])),
    )
    return steps, good, rules


@given(situations())
def test_never_fewer_good_ones_than_asked_for(situation: tuple[list[int], list[Kept], Keep]) -> None:
    steps, good, rules = situation
    gone = doomed(steps, good, rules)
    newest = sorted((kept.step for kept in good), reverse=True)[: max(2, rules.last)]
    assert not gone & set(newest)
    if len(good) <= max(2, rules.last):
        assert not [step for step in gone if step in {kept.step for kept in good}]
    assert gone <= set(steps)


@given(situations())
def test_pinned_best_and_every_kth_stay(situation: tuple[list[int], list[Kept], Keep]) -> None:
    steps, good, rules = situation
    gone = doomed(steps, good, rules)
    assert not gone & {kept.step for kept in good if kept.is_pinned}
    if rules.every:
        assert not gone & {kept.step for kept in good if kept.step % rules.every == 0}
        for span in range(1, 60 // rules.every + 1):
            inside = [kept.step for kept in good if kept.step // rules.every == span]
            assert not inside or min(inside) not in gone
    valued = [kept for kept in good if kept.value is not None]
    sign = 1 if rules.direction == "minimize" else -1
    best = sorted(valued, key=lambda kept: (sign * kept.value, kept.step))[: rules.best]
    assert not gone & {kept.step for kept in best}


@given(situations())
def test_nothing_is_kept_without_a_reason(situation: tuple[list[int], list[Kept], Keep]) -> None:
    steps, good, rules = situation
    gone = doomed(steps, good, rules)
    if len(good) < max(2, rules.last):
        assert gone == set()
        return
    limit = sorted((kept.step for kept in good), reverse=True)[max(2, rules.last) - 1]
    left = [step for step in steps if step < limit and step not in gone]
    allowed = rules.best + sum(kept.is_pinned for kept in good)
    if rules.every:
        allowed += 60 // rules.every
    assert len(left) <= allowed


@given(situations())
def test_what_stays_stays_when_it_is_asked_again(situation: tuple[list[int], list[Kept], Keep]) -> None:
    steps, good, rules = situation
    gone = doomed(steps, good, rules)
    left = [step for step in steps if step not in gone]
    assert doomed(left, [kept for kept in good if kept.step not in gone], rules) == set()


def test_of_equal_values_the_earlier_one_stays() -> None:
    good = [Kept(step, 1.0) for step in (1, 2, 3, 4)]
    assert doomed([1, 2, 3, 4], good, Keep(last=2, best=1)) == {2}
    assert doomed([1, 2, 3, 4], good, Keep(last=2, best=1, direction="maximize")) == {2}


def test_every_kth_where_saves_begin_late() -> None:
    """Beside the training a save of step 100 may become one of step 101."""
    steps = [50, 99, 101, 151, 202, 252, 301, 350, 400, 450]
    gone = doomed(steps, [Kept(step) for step in steps], Keep(last=2, every=100))
    assert sorted(set(steps) - gone) == [101, 202, 301, 400, 450]


# --- on disk -----------------------------------------------------------------------------------


def commit(root: Path, step: int, *, value: float | None = None, is_pinned: bool = False) -> None:
    draft = Draft(root, RUN, step, 1, ((1, 0),), None, "config", value=value, is_pinned=is_pinned)
    draft.add_bytes("model.pth", b"%d" % step)
    checkpoints.commit(draft, check_lease=lambda: None, record=lambda _: None, committed_at="now")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_run_that_is_interrupted_and_damaged_keeps_what_the_rules_say(data: st.DataObject) -> None:
    """What the manifests say is enough: a new attempt, which knows nothing, keeps the same."""
    rules = Keep(
        last=data.draw(st.integers(1, 4)),
        best=data.draw(st.integers(0, 2)),
        every=data.draw(st.sampled_from([0, 4])),
    )
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        root, known, everything = Path(name), {}, {}
        for step in range(1, 13):
            value = data.draw(st.none() | st.floats(0, 1))
            commit(root, step, value=value, is_pinned=data.draw(st.integers(0, 5)) == 0)
            found = checkpoints.kept(manifests.read_manifest(root / checkpoints.step_name(step)))
            everything[step] = known[step] = found
            if data.draw(st.integers(0, 3)) == 0:
                known = {}  # another attempt
            prune(root, rules, known)
            left = {step for step, _ in checkpoints.steps_on_disk(root)}
            newest = sorted(everything, reverse=True)[: max(2, rules.last)]
            assert set(newest) <= left
            assert {step for step, kept in everything.items() if kept.is_pinned} <= left
            ranked = sorted((kept.value, step) for step, kept in everything.items() if kept.value is not None)
            assert {step for _, step in ranked[: rules.best]} <= left
            assert not rules.every or {step for step in everything if step % rules.every == 0} <= left


def prune(root: Path, rules: Keep, known: dict[int, Kept] | None = None, **more: Any) -> list[int]:
    return checkpoints.prune(root, run_id=RUN, rules=rules, known_good={} if known is None else known, **more)


def test_one_resumed_from_stays_until_enough_newer_ones_are_durable(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    known = {3: Kept(3)}  # the attempt goes on from there
    for step, left in [(4, [4, 3, 2]), (5, [5, 4, 3]), (6, [6, 5, 4])]:
        commit(tmp_path, step)
        prune(tmp_path, Keep(last=3), known)
        assert [step for step, _ in checkpoints.steps_on_disk(tmp_path)] == left


def test_with_one_to_keep_the_second_is_proven_all_the_same(tmp_path: Path) -> None:
    """At least two are kept, and what is kept in place of a damaged one is good."""
    for step in (1, 2, 3):
        commit(tmp_path, step)
    (tmp_path / "step_00000002" / "model.pth").write_bytes(b"X")
    assert prune(tmp_path, Keep(last=1), {3: Kept(3)}) == []
    assert [step for step, _ in checkpoints.steps_on_disk(tmp_path)] == [3, 2, 1]
