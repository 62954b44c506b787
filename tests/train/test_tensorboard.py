"""Event files as TensorBoard itself reads them, over several attempts of a run."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
from crash import mini
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from workers import LIMIT_S, Workers, until

from sweeper import processes
from sweeper.tracking import MetricsLog
from sweeper.tracking.messages import End
from sweeper.tracking.metrics import read_rows
from sweeper.tracking.tensorboard_sink import TensorboardSink

END = End("s.r.00001", "completed", "completed")


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "tensorboard"


def scalars(directory: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """What TensorBoard shows: (step, value), in its order."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def log_steps(path: Path, first: int, last: int, *, scale: float = 1.0, offset: int = 0) -> int:
    """Write rows of these steps behind `offset`; return the new length."""
    with MetricsLog(path, offset=offset) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": scale * step})
        return log.sync()


def attempt(directory: Path, path: Path, *, until: int | None = None, is_killed: bool = False) -> None:
    """One attempt's sink, fed with what the log holds."""
    sink = TensorboardSink(directory, log_path=path)
    for row in read_rows(path):
        step = int(row["step"])
        if step >= sink.next_step and (until is None or step <= until):
            sink.write(step, {"loss": row["loss"]})
    if is_killed:
        sink.flush()
    else:
        sink.finish(END)


def test_rows_are_points(directory: Path, log_path: Path) -> None:
    log_path.write_bytes(b"")
    sink = TensorboardSink(directory, log_path=log_path)
    sink.write(0, {"loss": 0.5, "count": 3, "text": "not a number"})
    sink.write(10, {"loss": math.nan})
    sink.finish(END)
    (first, second) = scalars(directory)
    assert first == (0, 0.5)
    assert second[0] == 10
    assert math.isnan(second[1])
    assert scalars(directory, "count") == [(0, 3.0)]


def test_an_attempt_goes_on_where_event_files_and_log_agree(directory: Path, log_path: Path) -> None:
    offset = log_steps(log_path, 1, 5)
    log_steps(log_path, 6, 9, offset=offset)
    attempt(directory, log_path, is_killed=True)
    log_steps(log_path, 6, 8, scale=10, offset=offset)  # cut, and trained again with other values
    attempt(directory, log_path)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 9)]


def test_steps_that_the_log_lost_are_taken_back(directory: Path, log_path: Path) -> None:
    offset = log_steps(log_path, 1, 5)
    log_steps(log_path, 6, 9, offset=offset)
    attempt(directory, log_path, is_killed=True)
    log_steps(log_path, 6, 5, offset=offset)  # cut: the sink opens before anything is trained again
    sink = TensorboardSink(directory, log_path=log_path)
    assert sink.next_step == 6
    for step in (6, 7):
        sink.write(step, {"loss": 10.0 * step})
    sink.finish(END)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 6)] + [(6, 60.0), (7, 70.0)]


def test_what_a_killed_attempt_had_not_written_is_written_by_the_next(
    directory: Path, log_path: Path
) -> None:
    log_steps(log_path, 1, 9)
    attempt(directory, log_path, until=4, is_killed=True)
    attempt(directory, log_path)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 10)]


def test_a_torn_event_file_is_continued(directory: Path, log_path: Path) -> None:
    log_steps(log_path, 1, 9)
    attempt(directory, log_path, until=6)
    (file,) = directory.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    attempt(directory, log_path)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 10)]


def test_many_attempts_within_a_second_stay_in_order(directory: Path, log_path: Path) -> None:
    log_steps(log_path, 1, 12)
    for last in range(1, 13):
        attempt(directory, log_path, until=last, is_killed=last % 2 == 0)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 13)]
    assert len(list(directory.iterdir())) == 12


def test_attempts_that_are_taken_back_twice(directory: Path, log_path: Path) -> None:
    offset = log_steps(log_path, 1, 4)
    log_steps(log_path, 5, 9, offset=offset)
    attempt(directory, log_path)
    log_steps(log_path, 5, 4, offset=offset)
    sink = TensorboardSink(directory, log_path=log_path)  # killed before it wrote a row
    sink.flush()
    log_steps(log_path, 5, 6, scale=10, offset=offset)
    attempt(directory, log_path)
    assert scalars(directory) == [(s, 1.0 * s) for s in range(1, 5)] + [(5, 50.0), (6, 60.0)]


# --- a real sweep ------------------------------------------------------------------------------

SAVED, LOGGED = 6, 9
"""The step of the first checkpoint, and one behind it that was logged before the kill."""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_killed_between_a_checkpoint_and_rows_that_were_shown(tmp_path: Path, victim: str) -> None:
    """The points behind the checkpoint are taken back, and those of the next attempt stand alone."""
    root = tmp_path / "boards"
    place = mini.new_place(
        tmp_path / "data",
        trainer={"_target_": "crash_trainer.train", "act": "slow", "at": 5},
        checkpoint={"every_n_steps": SAVED},
        tracking={"wandb": {"mode": "disabled"}, "tensorboard": {"enabled": True, "dir": str(root)}},
    )
    made = Workers(place)
    directory = root / mini.SWEEP / mini.FIRST_RUN
    try:
        worker = made.worker()
        log = place.run_dir() / "metrics.jsonl"
        until(lambda: log.exists() and log.read_bytes().count(b"\n") >= LOGGED, f"step {LOGGED} was logged")
        trainer = made.trainer()
        assert trainer is not None
        os.kill(trainer, signal.SIGSTOP)
        until(lambda: last_step(directory) > SAVED, "a step behind the checkpoint was shown")
        os.kill(worker.pid if victim == "worker" else trainer, signal.SIGKILL)
        (place.data_dir / "go").touch()
        if victim == "worker":
            worker.wait(LIMIT_S)
            made.all_gone()
            made.finish()
        assert worker.wait(LIMIT_S) == (-signal.SIGKILL if victim == "worker" else 0), place.printed()
        assert made.outcomes() == ["lost", "completed"]
        assert f"going on from step {SAVED}" in place.printed()
    finally:
        made.end()
    logged = [(row["step"], row["train_loss"]) for row in read_rows(place.run_dir() / "metrics.jsonl")]
    assert [step for step, _ in logged] == list(range(1, 25))
    assert scalars(directory, "train_loss") == [(step, pytest.approx(value)) for step, value in logged]
    assert len(list(directory.iterdir())) == 2, "one file an attempt"


def last_step(directory: Path) -> int:
    """The newest step of event files that are being written; -1 for none yet."""
    try:
        return max(step for step, _ in scalars(directory, "train_loss")) if directory.is_dir() else -1
    except KeyError:
        return -1


@pytest.mark.slow
def test_a_launcher_shows_them_and_takes_tensorboard_with_it(tmp_path: Path) -> None:
    place = mini.new_place(
        tmp_path / "data",
        trainer={"_target_": "crash_trainer.train", "act": "slow", "at": 5},
        tracking={
            "wandb": {"mode": "disabled"},
            "tensorboard": {"enabled": True, "dir": str(tmp_path / "boards"), "port": 0},
        },
    )
    made = Workers(place)
    try:
        launcher = made.start("resume", mini.SWEEP)
        until(lambda: "[TENSORBOARD] http://localhost:" in place.printed(), "it was announced")
        pid = int(place.printed().split("(pid ")[1].split(")")[0])
        assert pid in made.alive()
        launcher.kill()
        launcher.wait(LIMIT_S)
        made.all_gone()
        assert processes.start_ticks(pid) is None
        (place.data_dir / "go").touch()
        launcher = made.start("resume", mini.SWEEP)
        assert launcher.wait(LIMIT_S) == 0, place.printed()
        assert made.alive() == []
    finally:
        made.end()
