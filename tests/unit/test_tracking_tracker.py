"""The worker's handle: it never waits, never raises, and a dead process is one warning.

With TensorBoard only: the process is the real one, and W&B's client is tested elsewhere.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper import processes, rundir
from sweeper.states import Outcome, State
from sweeper.tracking import MetricsLog, TensorboardSettings, Tracker, TrackingSettings, WandbSettings
from sweeper.tracking.tracker import Event
from sweeper.trainer import warm

BOARD_ONLY = TrackingSettings(wandb=WandbSettings(mode="disabled"))
NOTHING = TrackingSettings(WandbSettings(mode="disabled"), TensorboardSettings(is_enabled=False))


def wait_for(tracker: Tracker, condition: Callable[[Event], bool], timeout_s: float = 30.0) -> list[Event]:
    """Poll until an event fulfils `condition`."""
    seen: list[Event] = []
    deadline = time.monotonic() + timeout_s
    while True:
        events = tracker.poll()
        seen += events
        if any(condition(event) for event in events):
            return seen
        assert time.monotonic() < deadline, seen
        descriptor = tracker.fileno()
        assert descriptor is not None, seen
        select.select([descriptor], [], [], 0.5)


def is_event(name: str) -> Callable[[Event], bool]:
    return lambda event: event["event"] == name


def make_run(tmp_path: Path, *steps: int, number: int = 1) -> Path:
    run_dir = tmp_path / rundir.run_id("s", number)
    run_dir.mkdir(exist_ok=True)
    with MetricsLog(run_dir / rundir.METRICS_FILE) as log:
        for step in steps:
            log.write(step, {"loss": 1 / (step + 1)})
    return run_dir


def begin(tracker: Tracker, run_dir: Path, *, attempt: int = 1, config: dict[str, Any] | None = None) -> None:
    tracker.begin(
        run_dir=run_dir,
        run_id=run_dir.name,
        sweep="s",
        wandb_run_id=f"{run_dir.name}-abcd1234",
        attempt=attempt,
        lease_epoch=attempt,
        config=config or {},
    )


def end(tracker: Tracker, run_dir: Path) -> None:
    tracker.end(run_id=run_dir.name, outcome=Outcome.COMPLETED, state=State.COMPLETED, value=1.0)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker.start(BOARD_ONLY, log_path=tmp_path / "tracker.log")
    yield tracker
    tracker.close(5)


def test_no_process_is_started_when_nothing_is_wanted(tmp_path: Path) -> None:
    tracker = Tracker.start(NOTHING)
    begin(tracker, make_run(tmp_path))
    end(tracker, make_run(tmp_path))
    assert (tracker.pid, tracker.fileno(), tracker.poll(), tracker.close(1)) == (None, None, [], [])


def test_runs_are_carried_over_one_after_the_other(tracker: Tracker, tmp_path: Path) -> None:
    for number in (1, 2):
        run_dir = make_run(tmp_path, 1, 2, number=number)
        begin(tracker, run_dir)
        end(tracker, run_dir)
    events = tracker.close(30)
    assert [e["event"] for e in events] == ["tensorboard", "done", "tensorboard", "done", "closed"]
    assert [e["run_id"] for e in events if e["event"] == "done"] == ["s.r.00001", "s.r.00002"]
    assert tracker.pid is None
    assert tracker.close(1) == []


def test_a_process_that_dies_is_one_warning_and_the_run_is_told_again(
    tracker: Tracker, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, 1, 2)
    begin(tracker, run_dir)
    wait_for(tracker, is_event("tensorboard"))
    first = tracker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    events = wait_for(tracker, is_event("warning"))
    assert [e["event"] for e in events] == ["warning"]
    assert "signal 9" in events[0]["text"]
    assert tracker.pid not in (None, first)
    end(tracker, run_dir)
    assert [e["event"] for e in tracker.close(30)] == ["tensorboard", "done", "closed"]


def test_a_process_that_keeps_dying_is_started_again_at_the_next_begin_only(
    tracker: Tracker, tmp_path: Path
) -> None:
    begin(tracker, make_run(tmp_path, 1))
    for _ in range(2):
        assert tracker.pid is not None
        os.kill(tracker.pid, signal.SIGKILL)
        wait_for(tracker, is_event("warning"))
    assert tracker.pid is None
    run_dir = make_run(tmp_path, 1, number=2)
    begin(tracker, run_dir)
    end(tracker, run_dir)
    wait_for(tracker, lambda event: event["event"] == "done" and event["run_id"] == run_dir.name)


def test_a_stopped_process_delays_nobody(tracker: Tracker, tmp_path: Path) -> None:
    assert tracker.pid is not None
    os.kill(tracker.pid, signal.SIGSTOP)
    pid = tracker.pid
    slowest_s = 0.0
    for number in range(1, 101):
        run_dir = make_run(tmp_path, number=number)
        before = time.perf_counter()
        begin(tracker, run_dir, config={"text": "x" * 20_000})
        end(tracker, run_dir)
        tracker.poll()
        slowest_s = max(slowest_s, time.perf_counter() - before)
    assert slowest_s < 0.2
    before = time.monotonic()
    events = tracker.close(0.3)
    assert time.monotonic() - before < 3
    assert [e["event"] for e in events] == ["warning"]
    assert "s.r.00001" in events[0]["text"]
    assert processes.start_ticks(pid) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_signals_do_not_end_the_process(tracker: Tracker, tmp_path: Path, number: signal.Signals) -> None:
    run_dir = make_run(tmp_path, 1)
    begin(tracker, run_dir)
    wait_for(tracker, is_event("tensorboard"))
    assert tracker.pid is not None
    os.kill(tracker.pid, number)
    end(tracker, run_dir)
    assert [e["event"] for e in tracker.close(30)] == ["done", "closed"]


def test_it_is_in_a_session_of_its_own_and_holds_no_database_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPER_STORAGE", "postgresql://me:secret@host/db")
    monkeypatch.setenv("PGPASSWORD", "secret")
    tracker = Tracker.start(BOARD_ONLY)
    try:
        assert tracker.pid is not None
        assert os.getsid(tracker.pid) == tracker.pid
        assert b"secret" not in Path(f"/proc/{tracker.pid}/environ").read_bytes()
        assert os.get_inheritable(tracker.fileno() or -1) is False
    finally:
        tracker.close(10)


def test_trainers_hold_no_database_password_either() -> None:
    of_worker = {"SWEEPER_STORAGE": "postgresql://me:secret@host/db", "PGPASSWORD": "secret", "PGHOST": "db"}
    found = warm.environment_of(of_worker)
    assert "secret" not in str(found)
    assert found["PGHOST"] == "db"


def test_an_older_owner_does_nothing(tracker: Tracker, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, 1)
    rundir.write_marker(run_dir, attempt=7, lease_epoch=7, owner=processes.identify(), started_at="")
    begin(tracker, run_dir, attempt=6)
    end(tracker, run_dir)
    assert [e["event"] for e in tracker.close(30)] == ["done", "closed"]
    assert not (run_dir / "tensorboard").exists()


def test_a_value_that_cannot_be_sent_is_text(tracker: Tracker, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, 1)
    begin(tracker, run_dir, config={"path": Path("/x"), "nan": float("nan")})
    end(tracker, run_dir)
    assert [e["event"] for e in tracker.close(30)] == ["tensorboard", "done", "closed"]


WORKER = """
import sys, time
from sweeper.tracking import Tracker, TrackingSettings, WandbSettings
tracker = Tracker.start(TrackingSettings(wandb=WandbSettings(mode="disabled")))
print(tracker.pid, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_its_worker() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    descriptor = os.pidfd_open(pid)
    try:
        worker.kill()
        worker.wait()
        assert select.select([descriptor], [], [], 10)[0], "the tracker outlived its worker"
    finally:
        os.close(descriptor)


def test_importing_it_loads_neither_wandb_nor_tensorboard_nor_torch() -> None:
    code = (
        "import sys, sweeper.tracking, sweeper.tracking.server;"
        "print(sorted({'wandb', 'tensorboard', 'torch', 'numpy', 'google'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
