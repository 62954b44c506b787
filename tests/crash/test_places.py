"""A sound run and a place that is not: another data directory, code that changed, a disk that refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash import mini
from crash.mini import KillAt, Place, final, finish, kind_of

from sweeper.errors import EXIT_CONFIG, ConfigError, SweeperError
from sweeper.settling import check_data_dir
from sweeper.store import Store
from sweeper.trainer.main import _is_disk_fault, find_function


@pytest.fixture(scope="module")
def stopped(fast_dir: Path) -> Place:
    """Killed after its second checkpoint."""
    place = mini.new_place(fast_dir / "places")
    trace = mini.traced(place.copy(fast_dir / "places-done"), fast_dir / "places.trace")
    second = next(i for i, operation in enumerate(trace) if kind_of(*operation) == "rename step_00000004")
    assert mini.was_killed(finish(place, probe=KillAt(second + 12)))
    assert mini.checkpoints.steps_on_disk(place.root())
    return place


def test_another_data_directory_is_refused_and_nothing_is_superseded(stopped: Place, where: Path) -> None:
    place = stopped.copy(where)
    store = Store(place.url)
    sweep = store.sweep(mini.SWEEP)
    check_data_dir(store, sweep, place.data_dir)
    with pytest.raises(ConfigError, match="another data directory, or its disk is not mounted"):
        check_data_dir(store, sweep, place.data_dir / "elsewhere")
    (run,) = store.runs(sweep.sweep_id)
    assert run.state == "running"
    store.close()


def test_a_disk_that_refuses_the_owner_costs_no_budget(stopped: Place, where: Path) -> None:
    """The marker of the new owner cannot be written, three times; then there is room."""
    place = stopped.copy(where)
    refused = 0

    def full(operation: str, path: Path) -> None:
        nonlocal refused
        if operation == "create" and ".incomplete" in path.name and refused < 3:
            refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    assert finish(place, probe=full) == 0, place.printed()
    rows = place.rows("SELECT outcome, reason FROM sweeper_attempt ORDER BY attempt")
    assert [row["outcome"] for row in rows] == ["lost", "lost", "lost", "lost", "completed"]
    assert "No space left" in rows[1]["reason"]
    (run,) = place.rows("SELECT lost_count FROM sweeper_run")
    assert run["lost_count"] <= 1, "what the disk did is not counted"
    assert final(place).problems == []


def test_sound_checkpoints_of_another_training_stop_the_worker(stopped: Place, where: Path) -> None:
    """Somebody has edited the model: nothing is discarded, and the same code goes on as if nothing was."""
    place = stopped.copy(where)
    steps = mini.checkpoints.steps_on_disk(place.root())
    train = mini.train

    def edited(cfg: Any, run: Any) -> float:
        return train(SimpleNamespace(**{**cfg, "width": cfg.width + 1}), run)

    def work() -> int:
        mini.train = edited  # type: ignore[assignment]
        try:
            return mini.work(place)()
        except SweeperError as error:
            return error.exit_code

    assert os.waitstatus_to_exitcode(mini.forked(work, log=place.log)) == EXIT_CONFIG
    assert "fits this training" in place.printed()
    assert mini.checkpoints.steps_on_disk(place.root()) == steps
    (run,) = place.rows("SELECT state, crashed_count FROM sweeper_run")
    assert (run["state"], run["crashed_count"]) == ("interrupted", 0)
    assert finish(place) == 0, place.printed()
    assert final(place).problems == []


@pytest.mark.parametrize(
    ("path", "is_fault"),
    [(None, True), ("checkpoints/step_00000001/model.pth", True), ("/home/me/.cache/x", False)],
)
def test_whose_disk_it_is(path: str | None, is_fault: bool, tmp_path: Path) -> None:
    """A fault outside the run directory is the training's own affair; `print` names no file."""
    name = None if path is None else str(tmp_path / path)
    error = OSError(errno.EROFS, "Read-only file system", name)
    assert _is_disk_fault(error, tmp_path) == is_fault


def test_a_module_that_does_not_parse_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_training.py").write_text("def train(cfg, run) return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="SyntaxError"):
        find_function("broken_training.train")


def test_a_full_disk_under_the_log_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be printed is left out; the worker hears all the same."""
    from sweeper.trainer import run

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    run.say("it goes on")
