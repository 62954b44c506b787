"""ENOSPC, EIO and EROFS at every file operation: loud, nothing lost, and the same bytes in the end."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.mini import (
    FIRST_RUN,
    FailAt,
    Final,
    Place,
    Trace,
    checkpoints,
    failures,
    final,
    finish,
    kind_of,
)

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS)
Check = Callable[[int, Path], str | None]


def newest_committed(trace: Trace) -> int | None:
    """The newest step that was renamed into place in these operations, and is durable."""
    steps = [
        int(Path(path).name.removeprefix("step_"))
        for (operation, path), after in itertools.pairwise(trace)
        if operation == "rename" and Path(path).name.startswith("step_") and after[0] == "fsync_dir"
    ]
    return max(steps, default=None)


def failed_then_finished(base: Place, trace: Trace, end: Final, *, stays: bool, shift: int = 0) -> Check:
    """Let the disk refuse one operation, or all from that one on; then mend it and go on."""

    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        number = ERRNOS[(at + shift) % len(ERRNOS)]
        status = finish(place, probe=FailAt(at, number, stays))
        printed = place.printed()
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) not in (0, 1):
            return f"the worker ended with {status}: {printed}"
        if os.strerror(number) not in printed:
            return f"nothing was said about it: {printed}"
        if "Traceback" in printed and "Error: [Errno" not in printed:
            return f"it was taken for another error: {printed}"
        found = checkpoints.newest_valid(place.root(), run_id=FIRST_RUN)
        if (found or 0) < (newest_committed(trace[:at]) or 0):
            return f"step {newest_committed(trace[:at])} had been committed, {found} is the newest valid one"
        states = [row["state"] for row in place.rows("SELECT state FROM sweeper_run")]
        if "failed" in states or "superseded" in states:
            return f"the runs are {states}: {printed}"
        if (status := finish(place)) != 0:
            return f"the successor ended with {status}: {place.printed()}"
        return end.differs(final(place))

    return check


def test_one_refused_operation(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    assert failures(failed_then_finished(fresh, trace, end, stays=False), range(1, len(trace), 12)) == []


def test_a_disk_that_stays_bad(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    assert failures(failed_then_finished(fresh, trace, end, stays=True), range(2, len(trace), 20)) == []


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(len(ERRNOS)))
def test_every_operation_refused_once(fresh: Place, undisturbed: tuple[Trace, Final], shift: int) -> None:
    """Three times round, so that every operation meets every error."""
    trace, end = undisturbed
    check = failed_then_finished(fresh, trace, end, stays=False, shift=shift)
    assert failures(check, range(len(trace))) == []


@pytest.mark.slow
def test_a_disk_that_stays_bad_from_every_operation_on(
    fresh: Place, undisturbed: tuple[Trace, Final]
) -> None:
    trace, end = undisturbed
    assert failures(failed_then_finished(fresh, trace, end, stays=True), range(len(trace))) == []


def test_training_goes_on_when_a_checkpoint_cannot_be_written(
    fresh: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    trace, end = undisturbed
    at = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "fsync draft/optimizer.pt")
    place = fresh.copy(where)
    assert finish(place, probe=FailAt(at, errno.ENOSPC)) == 0
    assert "step 2 could not be saved" in place.printed()
    attempts = place.rows("SELECT outcome FROM sweeper_attempt")
    assert attempts == [{"outcome": "completed"}], "one attempt, undisturbed by the disk"
    assert end.differs(final(place)) is None


@pytest.mark.parametrize("number", ERRNOS)
def test_a_refusal_that_ends_an_attempt_is_no_crash_of_the_training(
    fresh: Place, undisturbed: tuple[Trace, Final], where: Path, number: int
) -> None:
    """It costs nothing of the budgets, of which this sweep has none for crashes."""
    trace, end = undisturbed
    at = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "create .metrics")
    place = fresh.copy(where)
    assert finish(place, probe=FailAt(at, number)) == 0
    rows = place.rows("SELECT outcome, reason, detail FROM sweeper_attempt ORDER BY attempt")
    assert [row["outcome"] for row in rows] == ["lost", "completed"]
    assert os.strerror(number) in rows[0]["reason"]
    assert "Traceback" in rows[0]["detail"]
    assert end.differs(final(place)) is None


def test_a_refused_checkpoint_gives_its_space_back(
    fresh: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    trace, _ = undisturbed
    at = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "create draft/MANIFEST.json")
    place = fresh.copy(where)

    class Look(FailAt):
        """Fails once, and looks what lies around when the next checkpoint begins."""

        def __call__(self, operation: str, path: Path) -> None:
            if self.count > at and operation == "mkdir":
                print("DRAFTS", len(list(place.root().glob(".tmp-*"))), flush=True)
            super().__call__(operation, path)

    assert finish(place, probe=Look(at, errno.ENOSPC)) == 0
    assert "DRAFTS 0" in place.printed()


def test_a_refused_prune_is_no_refused_checkpoint(
    fresh: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    trace, end = undisturbed
    at = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "mkdir .trash")
    place = fresh.copy(where)
    assert finish(place, probe=FailAt(at, errno.EIO)) == 0
    assert "could not be saved" not in place.printed()
    assert os.strerror(errno.EIO) in place.printed()
    assert place.rows("SELECT outcome FROM sweeper_attempt") == [{"outcome": "completed"}]
    assert end.differs(final(place)) is None
