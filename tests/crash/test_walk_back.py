"""Damaged and hostile checkpoints: each is refused with its reason, and the one before is used."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crash import mini
from crash.mini import (
    FIRST_RUN,
    Final,
    KillAt,
    Place,
    Trace,
    Watching,
    checkpoints,
    damage,
    final,
    finish,
    kind_of,
)

from sweeper import manifests, rundir

KEEP_LAST = 3


@pytest.fixture(scope="module")
def long(fast_dir: Path) -> tuple[Place, Trace, Final]:
    """Twelve steps, each a checkpoint: the fresh sweep, its operations, and its end."""
    place = mini.new_place(
        fast_dir / "long", trainer={"epochs": 4}, checkpoint={"every_n_steps": 1, "keep_last": KEEP_LAST}
    )
    done = place.copy(fast_dir / "long-done")
    trace = mini.traced(done, fast_dir / "long.trace")
    end = final(done)
    assert end.problems == []
    return place, trace, end


@pytest.fixture(scope="module")
def at_seven(fast_dir: Path, long: tuple[Place, Trace, Final]) -> Place:
    """Killed when it was about to write step 8: there are steps 5, 6 and 7."""
    fresh, trace, _ = long
    place = fresh.copy(fast_dir / "at-seven")
    named = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "rename step_00000007")
    begun = next(i for i, operation in enumerate(trace) if i > named and kind_of(*operation) == "mkdir draft")
    assert mini.was_killed(finish(place, probe=KillAt(begun)))
    assert steps(place) == [7, 6, 5]
    return place


def steps(place: Place, run_id: str = FIRST_RUN) -> list[int]:
    return [step for step, _ in checkpoints.steps_on_disk(place.root(run_id))]


def condemned(place: Place) -> set[str]:
    return {path.name[:13] for path in (place.root() / checkpoints.CONDEMNED).iterdir()}


def test_walk_back_over_two_damaged_ones_and_on(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path
) -> None:
    place = at_seven.copy(where)
    damage(place.root() / "step_00000007")
    (place.root() / "step_00000006" / "state.json").unlink()
    assert finish(place, probe=Watching(place.root())) == 0
    assert Watching.seen(place) == [
        [5],  # 6 and 7 shadow nothing
        [6, 5],
        [7, 6, 5],  # the one it went on from stays until three newer ones are durable
        [8, 7, 6],
        [9, 8, 7],
        [10, 9, 8],
        [11, 10, 9],
    ]
    assert condemned(place) == {"step_00000006", "step_00000007"}
    assert "step 7 refused: model.pth has the wrong digest" in place.printed()
    assert "step 6 refused: state.json is missing" in place.printed()
    assert "going on from step 5" in place.printed()
    assert long[2].differs(final(place)) is None


def test_damage_again_after_walking_back(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path
) -> None:
    """The checkpoints made anew under the old numbers are damaged as well."""
    place = at_seven.copy(where)
    damage(place.root() / "step_00000007")
    begun = [i for i, operation in enumerate(long[1]) if kind_of(*operation) == "mkdir draft"]
    assert mini.was_killed(finish(place, probe=KillAt(begun[2])))
    newest = steps(place)[0]
    damage(place.root() / checkpoints.step_name(newest), "rng_state.pt")
    assert finish(place) == 0
    assert f"step {newest} refused: rng_state.pt" in place.printed()
    assert long[2].differs(final(place)) is None


def test_all_damaged_is_a_fresh_run_of_the_same_trial(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path
) -> None:
    place = at_seven.copy(where)
    for step in (5, 6, 7):
        damage(place.root() / checkpoints.step_name(step), manifests.MANIFEST)
    assert finish(place) == 0
    assert long[2].differs(final(place)) is None
    rows = place.rows(
        "SELECT run_id, state, params, seed, replaces, wandb_run_id FROM sweeper_run ORDER BY number"
    )
    assert [row["state"] for row in rows] == ["superseded", "completed"]
    assert rows[1]["replaces"] == rows[0]["run_id"]
    assert (rows[1]["params"], rows[1]["seed"]) == (rows[0]["params"], rows[0]["seed"])
    assert rows[1]["wandb_run_id"] != rows[0]["wandb_run_id"]
    assert steps(place) == [7, 6, 5], "what was refused stays to be looked at"


def test_all_damaged_is_a_failure_when_that_is_asked_for(fast_dir: Path, where: Path) -> None:
    place = mini.new_place(where, resume={"on_invalid": "fail"}, checkpoint={"every_n_steps": 1})
    trace = mini.traced(place.copy(fast_dir / "on-invalid"), fast_dir / "on-invalid.trace")
    named = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "rename step_00000003")
    assert mini.was_killed(finish(place, probe=KillAt(named)))
    for step in steps(place):
        damage(place.root() / checkpoints.step_name(step))
    finish(place)
    (row,) = place.rows("SELECT state, reason FROM sweeper_run")
    assert row["state"] == "failed"
    assert "no valid checkpoint" in row["reason"]
    assert not rundir.marker_path(place.run_dir()).exists()


# --- hostile ------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.crater}",)


def armed(crater: Path, *, is_archive: bool) -> bytes:
    if not is_archive:
        return pickle.dumps(Bomb(crater))
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(crater)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "pickle"])
@pytest.mark.parametrize("name", ["model.pth", "rng_state.pt"])
def test_a_pickle_bomb_with_a_correct_manifest_does_not_go_off(
    at_seven: Place,
    long: tuple[Place, Trace, Final],
    where: Path,
    fast_dir: Path,
    name: str,
    is_archive: bool,
) -> None:
    place = at_seven.copy(where)
    crater = fast_dir / "crater"
    true = manifests.read_manifest(place.root() / "step_00000007")
    made = checkpoints.Draft(place.root(), FIRST_RUN, 8, 1, true.lineage, None, true.config_digest)
    for file in true.files:
        genuine = (place.root() / "step_00000007" / file).read_bytes()
        made.add_bytes(file, armed(crater, is_archive=is_archive) if file == name else genuine)
    checkpoints.commit(made, check_lease=lambda: None, record=lambda _: None, committed_at="now")
    checkpoints.validate(place.root() / "step_00000008", run_id=FIRST_RUN)
    assert finish(place) == 0
    assert not crater.exists()
    assert f"step 8 refused: {name} does not hold plain tensors" in place.printed()
    assert "going on from step 7" in place.printed()
    assert long[2].differs(final(place)) is None


def linked_directory(step: Path) -> None:
    step.rename(step.parent / "elsewhere")
    step.symlink_to("elsewhere")


def linked_file(step: Path) -> None:
    (step / "model.pth").rename(step.parent / "elsewhere.pth")
    (step / "model.pth").symlink_to(step.parent / "elsewhere.pth")


def huge_manifest(step: Path) -> None:
    os.truncate(step / manifests.MANIFEST, 200 << 20)


def older_one_under_its_name(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.parent / "step_00000005", step)


def directory_for_a_file(step: Path) -> None:
    (step / "optimizer.pt").unlink()
    (step / "optimizer.pt").mkdir()


def file_for_the_directory(step: Path) -> None:
    shutil.rmtree(step)
    step.write_bytes(b"not a directory")


def anothers(step: Path) -> None:
    os.chown(step, 12345, 12345)


@pytest.mark.parametrize(
    "spoil",
    [
        linked_directory,
        linked_file,
        huge_manifest,
        older_one_under_its_name,
        directory_for_a_file,
        file_for_the_directory,
        pytest.param(
            anothers, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
        ),
    ],
)
def test_a_hostile_checkpoint_is_refused_and_the_run_goes_on(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path, spoil: Callable[[Path], None]
) -> None:
    place = at_seven.copy(where)
    spoil(place.root() / "step_00000007")
    assert finish(place) == 0
    assert "step 7 refused: " in place.printed()
    assert "going on from step 6" in place.printed()
    assert long[2].differs(final(place)) is None


def test_a_lost_or_lying_pointer_changes_nothing(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path
) -> None:
    """The disk decides; the pointer is a hint that the next commit repairs."""
    place = at_seven.copy(where)
    (place.root() / checkpoints.POINTER).write_text('{"step": 999, "directory": "../../../etc"}')
    assert finish(place) == 0
    assert "going on from step 7" in place.printed()
    assert mini.read_pointer(place.root())["step"] == 12
    assert long[2].differs(final(place)) is None


def test_another_runs_checkpoint_copied_in_is_refused(
    at_seven: Place, long: tuple[Place, Trace, Final], where: Path
) -> None:
    place = at_seven.copy(where)
    true = manifests.read_manifest(place.root() / "step_00000007")
    made = checkpoints.Draft(place.root(), "mini.r.00009", 8, 1, true.lineage, None, true.config_digest)
    for file in true.files:
        made.add_bytes(file, (place.root() / "step_00000007" / file).read_bytes())
    checkpoints.commit(made, check_lease=lambda: None, record=lambda _: None, committed_at="now")
    assert finish(place) == 0
    assert "step 8 refused: it belongs to run 'mini.r.00009'" in place.printed()
    assert long[2].differs(final(place)) is None


def test_a_crash_while_creating_the_directory_and_another_launch_configuration(
    fresh: Place, undisturbed: tuple[Trace, Final], where: Path
) -> None:
    """What was written of config.yaml is of the first launch; the run is created by the second."""
    trace, end = undisturbed
    place = fresh.copy(where)
    at = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "rename run.json")
    assert mini.was_killed(finish(place, probe=KillAt(at)))
    assert (place.run_dir() / rundir.CONFIG_FILE).exists()
    store = mini.Store(place.url)
    store.update_sweep(mini.SWEEP, n_trials=1, config=mini.config(launcher={"n_workers": 7}))
    store.close()
    assert finish(place) == 0, place.printed()
    assert end.differs(final(place)) is None
