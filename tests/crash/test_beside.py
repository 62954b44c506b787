"""A saver beside the training: killed, refused by the disk, overtaken, at every operation it does."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import beside, mini
from crash.mini import (
    FIRST_RUN,
    FailAt,
    Final,
    KillAt,
    Place,
    Trace,
    checkpoints,
    failures,
    final,
    kind_of,
    was_killed,
)
from crash.test_disk_faults import ERRNOS, newest_committed
from crash.test_fencing import take_over, what_counts

from sweeper import processes

Check = Callable[[int, Path], str | None]


@pytest.fixture(scope="module")
def saver_trace(fast_dir: Path, fresh: Place, undisturbed: tuple[Trace, Final]) -> Trace:
    """What a saver does while nothing disturbs it; the run ends as one without a saver."""
    place = fresh.copy(fast_dir / "beside")
    trace = beside.traced(place, fast_dir / "beside.trace")
    assert undisturbed[1].differs(final(place)) is None
    return trace


def test_the_saver_does_all_of_a_commit(saver_trace: Trace) -> None:
    kinds = {kind_of(*operation) for operation in saver_trace}
    assert kinds >= {
        *("mkdir draft", "fsync draft/model.pth", "write draft/MANIFEST.json", "fsync_dir draft"),
        *("fsync metrics.jsonl", "rename step_00000003", "rename step_00000006", "fsync_dir checkpoints"),
        *("rename trainer_checkpoint.json", "rename .trash/…", "unlink model.pth"),
    }
    metrics = next(
        i for i, operation in enumerate(saver_trace) if operation[0] == "fsync" and "metrics" in operation[1]
    )
    first = next(i for i, operation in enumerate(saver_trace) if "step_" in operation[1])
    assert metrics < first, "rows are durable before the checkpoint that counts them"


# --- power loss ------------------------------------------------------------------------------


def both_killed_then_finished(base: Place, end: Final) -> Check:
    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        if not was_killed(beside.finish(place, probe=beside.KillBothAt(at))):
            return f"nobody was killed: {place.printed()}"
        if found := mini.broken_order(place):
            return found
        again = beside.finish if at % 2 else mini.finish
        if (status := again(place)) != 0:
            return f"the successor ended with {status}: {place.printed()}"
        return end.differs(final(place))

    return check


def test_both_killed_at_some_operations(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    check = both_killed_then_finished(fresh, undisturbed[1])
    assert failures(check, range(0, len(saver_trace), 13)) == []


@pytest.mark.slow
def test_both_killed_at_every_operation(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    check = both_killed_then_finished(fresh, undisturbed[1])
    assert failures(check, range(len(saver_trace))) == []


# --- the saver alone -------------------------------------------------------------------------


def saver_killed(base: Place, end: Final) -> Check:
    """The attempt is lost, which costs nothing of the crashes; the worker starts another one."""

    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        if (status := beside.finish(place, probe=KillAt(at))) != 0:
            return f"the worker ended with {status}: {place.printed()}"
        outcomes = [
            row["outcome"] for row in place.rows("SELECT outcome FROM sweeper_attempt ORDER BY attempt")
        ]
        if outcomes != ["lost", "completed"]:
            return f"the attempts ended {outcomes}: {place.printed()}"
        return end.differs(final(place))

    return check


def test_a_killed_saver_is_a_lost_attempt(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace, where: Path
) -> None:
    assert saver_killed(fresh, undisturbed[1])(len(saver_trace) // 2, where) is None
    reasons = Place(where).rows("SELECT reason FROM sweeper_attempt ORDER BY attempt")
    assert "the saver process ended in the middle of its work: SIGKILL" in reasons[0]["reason"]


@pytest.mark.slow
def test_a_saver_killed_at_every_operation(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    assert failures(saver_killed(fresh, undisturbed[1]), range(len(saver_trace))) == []


# --- the disk --------------------------------------------------------------------------------


def refused_then_finished(base: Place, trace: Trace, end: Final, *, stays: bool) -> Check:
    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        number = ERRNOS[at % len(ERRNOS)]
        status = beside.finish(place, probe=FailAt(at, number, stays))
        printed = place.printed()
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) not in (0, 1):
            return f"the worker ended with {status}: {printed}"
        if os.strerror(number) not in printed:
            return f"nothing was said about it: {printed}"
        found = checkpoints.newest_valid(place.root(), run_id=FIRST_RUN)
        if (found or 0) < (newest_committed(trace[:at]) or 0):
            return f"step {newest_committed(trace[:at])} had been committed, {found} is the newest valid one"
        states = [row["state"] for row in place.rows("SELECT state FROM sweeper_run")]
        if "failed" in states or "superseded" in states:
            return f"the runs are {states}: {printed}"
        if (status := beside.finish(place)) != 0:
            return f"the successor ended with {status}: {place.printed()}"
        return end.differs(final(place))

    return check


def test_one_operation_of_the_saver_refused(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    check = refused_then_finished(fresh, saver_trace, undisturbed[1], stays=False)
    assert failures(check, range(1, len(saver_trace), 13)) == []


@pytest.mark.slow
@pytest.mark.parametrize("stays", [False, True], ids=["once", "from-then-on"])
def test_every_operation_of_the_saver_refused(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace, stays: bool
) -> None:
    check = refused_then_finished(fresh, saver_trace, undisturbed[1], stays=stays)
    assert failures(check, range(len(saver_trace))) == []


def test_training_goes_on_when_the_savers_disk_refuses(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace, where: Path
) -> None:
    """fsync of the metrics log failed: it is never tried on that file again, its rows get a new one."""
    kinds = [kind_of(*operation) for operation in saver_trace]
    place = fresh.copy(where)

    class Look(FailAt):
        def __call__(self, operation: str, path: Path) -> None:
            if path.name == "metrics.jsonl":
                print("INODE", os.stat(path).st_ino, flush=True)
            super().__call__(operation, path)

    assert beside.finish(place, probe=Look(kinds.index("fsync metrics.jsonl"), errno.EIO)) == 0
    printed = place.printed()
    assert "checkpoint of step 3 could not be saved" in printed
    assert place.rows("SELECT outcome FROM sweeper_attempt") == [{"outcome": "completed"}]
    seen = [line for line in printed.splitlines() if line.startswith("INODE")]
    assert len(seen) >= 2
    assert seen[0] != seen[1]
    assert len(set(seen[1:])) == 1
    assert undisturbed[1].differs(final(place)) is None


# --- overtaken -------------------------------------------------------------------------------


def overtaken(base: Place, end: Final) -> Check:
    """Stop trainer and saver, let another owner finish the run, wake both."""

    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        zombie = mini.start(beside.work(place, probe=beside.StopBothAt(at)), log=place.log)
        if not mini.is_stopped(zombie):
            return f"nobody was stopped: {place.printed()}"
        saver = stopped_child(zombie)
        try:
            if (status := take_over(place)) != 0:
                return f"the new owner ended with {status}: {place.printed()}"
            if found := end.differs(final(place)):
                return f"before the old owner woke: {found}"
        finally:
            os.kill(saver, signal.SIGCONT)
            os.kill(zombie, signal.SIGCONT)
            mini.wait(zombie)
        if (status := mini.finish(place)) != 0:
            return f"the next worker ended with {status}: {place.printed()}"
        return end.differs(what_counts(place))

    return check


def stopped_child(pid: int) -> int:
    """The saver of a trainer, once it has stopped too."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return int(child)
        time.sleep(0.001)


DANGEROUS = (
    *("mkdir draft", "fsync draft/state.json", "fsync metrics.jsonl", "fsync_dir draft"),
    *("rename step_00000003", "rename step_00000006", "rename trainer_checkpoint.json", "rename .trash/…"),
)


def test_a_woken_saver_commits_nothing(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    kinds = [kind_of(*operation) for operation in saver_trace]
    cases = [kinds.index(kind) for kind in DANGEROUS]
    assert failures(overtaken(fresh, undisturbed[1]), cases) == []


@pytest.mark.slow
def test_a_woken_saver_commits_nothing_wherever_it_was_stopped(
    fresh: Place, undisturbed: tuple[Trace, Final], saver_trace: Trace
) -> None:
    assert failures(overtaken(fresh, undisturbed[1]), range(len(saver_trace))) == []


def test_no_saver_outlives_its_worker(fresh: Place, where: Path) -> None:
    place = fresh.copy(where)
    before = set(processes.children())
    assert beside.finish(place) == 0
    assert set(processes.children()) == before
