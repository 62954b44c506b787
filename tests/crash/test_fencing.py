"""An owner that was stopped, overtaken, and woken: nothing of it counts, wherever it was stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.mini import (
    FIRST_RUN,
    Final,
    KillAt,
    Place,
    StopAt,
    Trace,
    checkpoints,
    damage,
    failures,
    final,
    finish,
    forked,
    is_stopped,
    kind_of,
    start,
    traced,
    wait,
    was_killed,
    work,
)

from sweeper import manifests, observer, processes, worker
from sweeper.errors import Fenced
from sweeper.records import Death
from sweeper.retention import Keep, Kept
from sweeper.tracking import MetricsLog, read_rows

Check = Callable[[int, Path], str | None]


def take_over(place: Place) -> int:
    """Work as another worker would that cannot see the first: it takes everything for over."""

    def run() -> int:
        worker.Observer = lambda ttl_s, proof: observer.Observer(  # type: ignore[assignment,misc]
            ttl_s=ttl_s, proof=lambda process: Death("nobody renews its lease")
        )
        processes.kill_leftovers = lambda *_, **__: []
        return work(place)()

    return forked(run, log=place.log)


def overtaken(base: Place, end: Final) -> Check:
    """Stop a worker before one operation, let another finish the run, wake the first."""

    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        zombie = start(work(place, probe=StopAt(at)), log=place.log)
        if not is_stopped(zombie):
            return "nobody was stopped"
        try:
            status = take_over(place)
            if status != 0:
                return f"the new owner ended with {status}: {place.printed()}"
            if found := end.differs(final(place)):
                return f"before the old owner woke: {found}"
        finally:
            os.kill(zombie, signal.SIGCONT)
            wait(zombie)
        if (status := finish(place)) != 0:
            return f"the next worker ended with {status}: {place.printed()}"
        return end.differs(what_counts(place))

    return check


def what_counts(place: Place) -> Final:
    """The end of a place, without unfinished files of a fenced owner: it deletes nothing, they count for nothing.

    Among them is the directory of a fresh run that the database never heard of.
    """
    found = final(place)
    known = {row["run_id"] for row in place.rows("SELECT run_id FROM sweeper_run")}
    strange = {path.name for path in place.run_dir().parent.iterdir()} - known
    names = ("/.tmp-", ".tmp is left", "/.trash is left", *(f"/{run_id}/" for run_id in strange))
    problems = [text for text in found.problems if not any(name in text for name in names)]
    return dataclasses.replace(found, problems=problems)


DANGEROUS = (
    *("create .run.json", "rename mini.r.00000.incomplete", "create .metrics", "rename metrics.jsonl"),
    *("mkdir draft", "fsync draft/state.json", "rename step_00000002", "rename step_00000006"),
    *("rename trainer_checkpoint.json", "rename .trash/…", "create .result.json", "link result.json"),
)


def test_a_woken_owner_changes_nothing(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    kinds = [kind_of(*operation) for operation in trace]
    assert failures(overtaken(fresh, end), [kinds.index(kind) for kind in DANGEROUS]) == []


@pytest.mark.slow
def test_a_woken_owner_changes_nothing_wherever_it_was_stopped(
    fresh: Place, undisturbed: tuple[Trace, Final]
) -> None:
    trace, end = undisturbed
    assert failures(overtaken(fresh, end), range(len(trace))) == []


@pytest.mark.slow
def test_a_woken_resume_changes_nothing_wherever_it_was_stopped(
    fast_dir: Path, interrupted: Place, undisturbed: tuple[Trace, Final]
) -> None:
    torn = interrupted.copy(fast_dir / "fencing-torn")
    damage(torn.root() / "step_00000004")
    trace = traced(torn.copy(fast_dir / "fencing-traced"), fast_dir / "fencing.trace")
    assert failures(overtaken(torn, undisturbed[1]), range(len(trace))) == []


def test_rows_of_an_old_owner_go_to_a_file_that_nobody_reads(tmp_path: Path) -> None:
    def fenced() -> None:
        raise Fenced("lost")

    path = tmp_path / "metrics.jsonl"
    is_lost: list[bool] = []
    old = MetricsLog(path, check_lease=lambda: fenced() if is_lost else None)
    old.write(1, {"loss": 1.0})
    offset = old.sync()
    old.write(2, {"loss": 2.0})
    is_lost.append(True)
    new = MetricsLog(path, offset=offset)
    old.write(3, {"loss": 3.0})
    old.sync()
    new.write(2, {"loss": 22.0})
    with pytest.raises(Fenced):
        old.ensure_in_place()
    with pytest.raises(Fenced):
        MetricsLog(path, check_lease=fenced)
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1.0), (2, 22.0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_owner_whose_log_was_displaced_puts_its_own_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mine = MetricsLog(path)
    mine.write(1, {"loss": 1.0})
    MetricsLog(path).close()
    assert list(read_rows(path)) == []
    assert mine.ensure_in_place()
    mine.write(2, {"loss": 2.0})
    assert not mine.ensure_in_place()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


@pytest.mark.slow
def test_a_woken_superseder_changes_nothing_wherever_it_was_stopped(
    fast_dir: Path, interrupted: Place, undisturbed: tuple[Trace, Final]
) -> None:
    """It may finish writing a directory that the database never heard of: a gap in the numbers."""
    hopeless = interrupted.copy(fast_dir / "fencing-hopeless")
    for step in (2, 4):
        damage(hopeless.root() / f"step_0000000{step}")
    trace = traced(hopeless.copy(fast_dir / "superseding-traced"), fast_dir / "superseding.trace")
    kinds = [kind_of(*operation) for operation in trace]
    cases = range(kinds.index("unlink mini.r.00000.incomplete") + 3)
    assert len(cases) > 40
    assert failures(overtaken(hopeless, undisturbed[1]), cases) == []


# --- the occupied name -----------------------------------------------------------------------


def draft(root: Path, *, epoch: int, step: int = 4, lineage: manifests.Lineage = ()) -> checkpoints.Draft:
    made = checkpoints.Draft(root, FIRST_RUN, step, epoch, lineage or ((epoch, 0),), None, "config")
    made.add_bytes("model.pth", b"weights of epoch %d" % epoch)
    return made


def commit(made: checkpoints.Draft, *, check_lease: Callable[[], None] = lambda: None) -> None:
    checkpoints.commit(made, check_lease=check_lease, record=lambda _: None, committed_at="now")


def epoch_on_disk(root: Path, step: int = 4) -> int:
    manifest, _ = checkpoints.validate(root / checkpoints.step_name(step), run_id=FIRST_RUN)
    return manifest.lease_epoch


def test_a_name_taken_by_a_newer_owner_is_left_to_it(tmp_path: Path) -> None:
    late = draft(tmp_path, epoch=1)
    commit(draft(tmp_path, epoch=2))
    with pytest.raises(Fenced, match="newer owner"):
        commit(late)
    assert epoch_on_disk(tmp_path) == 2
    assert not list(tmp_path.glob(".aside-*"))


def test_a_name_taken_by_an_older_owner_is_taken_from_it(tmp_path: Path) -> None:
    mine = draft(tmp_path, epoch=2)
    commit(draft(tmp_path, epoch=1))
    commit(mine)
    assert epoch_on_disk(tmp_path) == 2


def test_a_damaged_directory_in_the_way_is_replaced(tmp_path: Path) -> None:
    commit(draft(tmp_path, epoch=1))
    damage(tmp_path / "step_00000004", manifests.MANIFEST, at=20)
    commit(draft(tmp_path, epoch=2))
    assert epoch_on_disk(tmp_path) == 2


def test_fenced_before_the_rename_deletes_nothing(tmp_path: Path) -> None:
    def fenced() -> None:
        raise Fenced("lost")

    commit(draft(tmp_path, epoch=1, step=2))
    with pytest.raises(Fenced):
        commit(draft(tmp_path, epoch=1), check_lease=fenced)
    assert [step for step, _ in checkpoints.steps_on_disk(tmp_path)] == [2]
    assert len(list(tmp_path.glob(".tmp-1-*"))) == 1


def test_an_old_owner_killed_at_any_operation_takes_nothing_from_a_newer_one(fast_dir: Path) -> None:
    """It may have moved the newer owner's checkpoint aside: the next owner puts it back."""
    for at in range(100):
        root = fast_dir / f"occupied-{at}"
        root.mkdir()
        late = draft(root, epoch=1)
        commit(draft(root, epoch=2))
        status = forked(killed_commit(late, at), log=fast_dir / "occupied.txt")
        checkpoints.clean(root, lease_epoch=3)
        assert epoch_on_disk(root) == 2, f"killed at operation {at}"
        assert not [path for path in root.iterdir() if path.name.startswith((".aside-", ".tmp-"))]
        if not was_killed(status):
            break
    assert 5 < at < 99


def test_an_owner_killed_at_any_operation_while_replacing_leaves_something_valid(fast_dir: Path) -> None:
    """An older owner's checkpoint is in the way: afterwards there is that one, or mine."""
    for at in range(100):
        root = fast_dir / f"replaced-{at}"
        root.mkdir()
        mine = draft(root, epoch=2)
        commit(draft(root, epoch=1))
        status = forked(killed_commit(mine, at), log=fast_dir / "replaced.txt")
        checkpoints.clean(root, lease_epoch=3)
        assert epoch_on_disk(root) in (1, 2), f"killed at operation {at}"
        if not was_killed(status):
            break
    assert 5 < at < 99


def killed_commit(made: checkpoints.Draft, at: int) -> Callable[[], int]:
    def run() -> int:
        checkpoints.fsops.probe = KillAt(at)
        try:
            commit(made)
        except Fenced:
            return 76
        return 0

    return run


# --- lineage ---------------------------------------------------------------------------------


def test_a_later_step_of_an_overtaken_owner_is_not_admissible(tmp_path: Path) -> None:
    commit(draft(tmp_path, epoch=1, step=2))
    commit(draft(tmp_path, epoch=2, step=3, lineage=((1, 0), (2, 2))))
    commit(draft(tmp_path, epoch=1, step=5))  # woken after epoch 2 went on from step 2
    found = {item.step: item.reason for item in checkpoints.inspect(tmp_path, run_id=FIRST_RUN)}
    assert found[3] is None
    assert found[2] is None
    assert found[5] is not None
    assert "epoch 2 went on from step 2" in found[5]
    assert checkpoints.newest_valid(tmp_path, run_id=FIRST_RUN) == 3


def test_the_database_alone_proves_that_an_owner_was_overtaken(tmp_path: Path) -> None:
    commit(draft(tmp_path, epoch=1, step=5))
    assert checkpoints.newest_valid(tmp_path, run_id=FIRST_RUN, starts=[(1, 0)]) == 5
    assert checkpoints.newest_valid(tmp_path, run_id=FIRST_RUN, starts=[(1, 0), (2, 5)]) == 5
    assert checkpoints.newest_valid(tmp_path, run_id=FIRST_RUN, starts=[(1, 0), (2, 4)]) is None


def test_prune_does_not_count_what_an_overtaken_owner_wrote(tmp_path: Path) -> None:
    starts = ((1, 0), (2, 2))
    commit(draft(tmp_path, epoch=1, step=2))
    commit(draft(tmp_path, epoch=2, step=3, lineage=starts))
    commit(draft(tmp_path, epoch=1, step=9))
    checkpoints.prune(tmp_path, run_id=FIRST_RUN, rules=Keep(last=2), known_good={3: Kept(3)}, starts=starts)
    assert [step for step, _ in checkpoints.steps_on_disk(tmp_path)] == [9, 3, 2]
