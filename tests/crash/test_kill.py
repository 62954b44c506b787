"""SIGKILL at every file operation; whoever comes next ends with the bytes of an undisturbed run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.mini import (
    SWEEP,
    Final,
    KillAt,
    Place,
    Store,
    Trace,
    broken_order,
    config,
    damage,
    failures,
    final,
    finish,
    kind_of,
    new_place,
    traced,
    was_killed,
)

from sweeper.rundir import read_result

Check = Callable[[int, Path], str | None]


def killed_then_finished(base: Place, end: Final, *, second: int | None = None) -> Check:
    """Kill a worker at one operation, its successor too if asked; the last one must end well."""

    def check(at: int, where: Path) -> str | None:
        place = base.copy(where)
        if not was_killed(finish(place, probe=KillAt(at))):
            return "nobody was killed"
        if found := broken_order(place):
            return found
        if second is not None:
            finish(place, probe=KillAt(random.Random(at + second).randrange(150)))
        status = finish(place)
        if status != 0:
            return f"the successor ended with {status}: {place.printed()}"
        return end.differs(final(place))

    return check


def names(trace: Trace) -> set[str]:
    return {kind_of(*operation) for operation in trace}


# --- the whole life of a run -----------------------------------------------------------------


def test_the_operations_are_those_of_the_protocols(undisturbed: tuple[Trace, Final]) -> None:
    trace, _ = undisturbed
    assert len(trace) > 100
    assert names(trace) >= {
        *("mkdir mini.r.00000", "rename config.yaml", "rename run.json", "rename mini.r.00000.incomplete"),
        *("create .metrics", "rename metrics.jsonl", "fsync metrics.jsonl", "mkdir draft"),
        *(
            f"{word} draft/{name}"
            for word in ("create", "write", "fsync")
            for name in ("model.pth", "MANIFEST.json")
        ),
        *(
            "fsync_dir draft",
            "rename step_00000006",
            "fsync_dir checkpoints",
            "rename trainer_checkpoint.json",
        ),
        *("rename .trash/…", "unlink model.pth", "rmdir .trash/…", "rename stage_status.json"),
        *("fsync .result.json", "link result.json", "unlink mini.r.00000.incomplete"),
    }


def test_kill_at_some_operations(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    assert failures(killed_then_finished(fresh, end), range(0, len(trace), 8)) == []


@pytest.mark.slow
def test_kill_at_every_operation(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    assert failures(killed_then_finished(fresh, end), range(len(trace))) == []


@pytest.mark.slow
def test_kill_again_during_the_recovery(fresh: Place, undisturbed: tuple[Trace, Final]) -> None:
    trace, end = undisturbed
    assert failures(killed_then_finished(fresh, end, second=1), range(0, len(trace), 3)) == []


def test_steps_beyond_the_checkpoint_are_lost_though_nobody_lived_to_say_so(
    interrupted: Place, where: Path
) -> None:
    place = interrupted.copy(where)
    assert finish(place) == 0
    found = place.rows("SELECT start_step, end_step FROM sweeper_attempt ORDER BY attempt")
    assert [tuple(row.values()) for row in found] == [(0, 6), (4, 6)]


# --- a resume that has something to move out of the way --------------------------------------


@pytest.fixture(scope="module")
def torn(fast_dir: Path, interrupted: Place) -> Place:
    """The newest checkpoint is damaged: the next owner goes on from step 2 and condemns step 4."""
    place = interrupted.copy(fast_dir / "torn")
    damage(place.root() / "step_00000004")
    return place


@pytest.fixture(scope="module")
def resume_trace(fast_dir: Path, torn: Place) -> Trace:
    trace = traced(torn.copy(fast_dir / "torn-undisturbed"), fast_dir / "torn.trace")
    assert names(trace) >= {
        *("rename .condemned/…", "create .metrics", "write .metrics", "rename metrics.jsonl"),
        *("unlink model.pth", "rmdir draft", "rename step_00000004", "rename step_00000006"),
    }
    return trace


def test_kill_in_a_resume_at_some_operations(
    torn: Place, resume_trace: Trace, undisturbed: tuple[Trace, Final]
) -> None:
    first_save = next(i for i, operation in enumerate(resume_trace) if kind_of(*operation) == "mkdir draft")
    assert first_save > 15
    assert failures(killed_then_finished(torn, undisturbed[1]), range(0, first_save, 4)) == []


@pytest.mark.slow
def test_kill_at_every_operation_of_a_resume(
    torn: Place, resume_trace: Trace, undisturbed: tuple[Trace, Final]
) -> None:
    assert failures(killed_then_finished(torn, undisturbed[1]), range(len(resume_trace))) == []


def test_partial_checkpoints_are_gone_before_the_next_owner_trains(
    interrupted: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    """So that a rename which an overtaken owner still has in mind finds nothing to rename."""
    place = interrupted.copy(where)
    assert len(list(place.root().glob(".tmp-1-*"))) == 1

    def look(operation: str, path: Path) -> None:
        if kind_of(operation, str(path)) == "create .metrics":
            print("DRAFTS", len(list(place.root().glob(".tmp-*"))), flush=True)

    assert finish(place, probe=look) == 0
    assert "DRAFTS 0" in place.printed()
    assert undisturbed[1].differs(final(place)) is None


# --- superseding -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hopeless(fast_dir: Path, interrupted: Place) -> Place:
    """Every checkpoint is damaged: the next owner starts a fresh run of the same trial."""
    place = interrupted.copy(fast_dir / "hopeless")
    for step in (2, 4):
        damage(place.root() / f"step_0000000{step}")
    return place


@pytest.fixture(scope="module")
def supersede_trace(fast_dir: Path, hopeless: Place) -> Trace:
    trace = traced(hopeless.copy(fast_dir / "hopeless-undisturbed"), fast_dir / "hopeless.trace")
    assert names(trace) >= {
        *("mkdir mini.r.00001", "rename run.json", "rename mini.r.00001.incomplete", "link result.json"),
        *("unlink mini.r.00000.incomplete", "unlink mini.r.00001.incomplete", "rename step_00000006"),
    }
    return trace


def superseding(trace: Trace) -> range:
    """The operations up to the first of the fresh run's training."""
    closed = next(
        i for i, operation in enumerate(trace) if kind_of(*operation) == "unlink mini.r.00000.incomplete"
    )
    return range(closed + 3)


def test_kill_in_superseding_at_some_operations(
    hopeless: Place, supersede_trace: Trace, undisturbed: tuple[Trace, Final]
) -> None:
    cases = superseding(supersede_trace)
    assert len(cases) > 40
    assert failures(killed_then_finished(hopeless, undisturbed[1]), cases[::6]) == []


@pytest.mark.slow
def test_kill_at_every_operation_of_superseding(
    hopeless: Place, supersede_trace: Trace, undisturbed: tuple[Trace, Final]
) -> None:
    cases = superseding(supersede_trace)
    assert failures(killed_then_finished(hopeless, undisturbed[1]), cases) == []
    assert failures(killed_then_finished(hopeless, undisturbed[1], second=2), cases[::3]) == []


@pytest.mark.slow
def test_kill_at_every_operation_of_superseding_by_resume_mode_never(
    fast_dir: Path, interrupted: Place, undisturbed: tuple[Trace, Final]
) -> None:
    place = interrupted.copy(fast_dir / "never")
    store = Store(place.url)
    store.update_sweep(SWEEP, n_trials=1, config=config(resume={"mode": "never"}))
    store.close()
    cases = superseding(traced(place.copy(fast_dir / "never-undisturbed"), fast_dir / "never.trace"))
    assert len(cases) > 40
    assert failures(killed_then_finished(place, undisturbed[1]), cases) == []


# --- adopting a result -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_result(fast_dir: Path, fresh: Place, undisturbed: tuple[Trace, Final]) -> Place:
    """Killed when result.json was durable, before the database knew."""
    kinds = [kind_of(*operation) for operation in undisturbed[0]]
    place = fresh.copy(fast_dir / "with-result")
    assert was_killed(finish(place, probe=KillAt(kinds.index("link result.json") + 1)))
    return place


def test_a_result_on_disk_is_adopted_not_trained_again(
    with_result: Place, undisturbed: tuple[Trace, Final], where: Path, fast_dir: Path
) -> None:
    place = with_result.copy(where)
    trace = traced(place, fast_dir / "adopted.trace")
    assert not {"create .metrics", "mkdir draft", "create .result.json"} & names(trace)
    assert "had written the result (completed); adopted" in place.printed()
    assert read_result(place.run_dir())["lease_epoch"] == 1  # type: ignore[index]
    assert undisturbed[1].differs(final(place)) is None


def test_a_result_of_an_epoch_before_the_last_is_moved_aside(
    with_result: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    """Its adopter was killed: what came in between cannot be known, the end is reached anew."""
    place = with_result.copy(where)
    assert was_killed(finish(place, probe=KillAt(0)))
    assert finish(place) == 0
    assert read_result(place.run_dir())["lease_epoch"] == 3  # type: ignore[index]
    assert len(list(place.run_dir().glob("result.aside.*.json"))) == 1
    assert undisturbed[1].differs(final(place)) is None


@pytest.mark.slow
def test_kill_at_every_operation_of_adopting_a_result(
    with_result: Place, undisturbed: tuple[Trace, Final], fast_dir: Path
) -> None:
    adopting = traced(with_result.copy(fast_dir / "adopting"), fast_dir / "adopting.trace")
    assert "unlink mini.r.00000.incomplete" in names(adopting)
    assert failures(killed_then_finished(with_result, undisturbed[1]), range(len(adopting))) == []


# --- a run that is pruned --------------------------------------------------------------------


def pruned_place(fast_dir: Path, name: str) -> tuple[Place, Trace, Final]:
    """A sweep whose pruner stops the trial in the middle of its second epoch."""
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": 0.0, "n_warmup_steps": 4}
    place = new_place(fast_dir / name, pruner=pruner, trainer={"reports": "loss"})
    done = place.copy(fast_dir / f"{name}-done")
    trace = traced(done, fast_dir / f"{name}.trace")
    end = final(done)
    assert end.problems == []
    assert end.state == "pruned"
    assert 1 < end.step < 6
    return place, trace, end


@pytest.mark.slow
def test_kill_at_every_operation_of_a_pruned_run(fast_dir: Path) -> None:
    """Steps that are replayed get the stored verdict; the run ends where it was stopped."""
    place, trace, end = pruned_place(fast_dir, "pruned")
    assert failures(killed_then_finished(place, end), range(len(trace))) == []
