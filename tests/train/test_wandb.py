"""The real W&B client in a real tracker process, offline and against a loopback server.

What this does not prove: what wandb.ai itself does with rows, resumes and states.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper import processes, rundir
from sweeper.states import Outcome, State
from sweeper.tracking import (
    MetricsLog,
    TensorboardSettings,
    Tracker,
    TrackingSettings,
    WandbSettings,
    orphans,
    wandb_files,
)
from sweeper.tracking.tracker import Event

sys.path.insert(0, str(Path(__file__).parents[1]))
from wandb_server import API_KEY, WandbServer

pytestmark = pytest.mark.slow

RUN_ID = "s.r.00001"
SUFFIX = f"{os.getpid():08x}"  # tests in other processes must not end each other's services
WANDB_ID = f"{RUN_ID}-{SUFFIX}"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings and no proxy of the person who runs these tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / RUN_ID
    path.mkdir(parents=True)
    return path


class Worker:
    """What a worker does with its tracker, and everything that it heard."""

    def __init__(self, log_path: Path, **wandb: Any) -> None:
        settings = TrackingSettings(WandbSettings(**wandb), TensorboardSettings(is_enabled=False))
        self.tracker = Tracker.start(settings, log_path=log_path)
        self.events: list[Event] = []

    def begin(self, run_dir: Path, *, attempt: int = 1, config: dict[str, Any] | None = None) -> None:
        self.tracker.begin(
            run_dir=run_dir,
            run_id=run_dir.name,
            sweep="s",
            wandb_run_id=f"{run_dir.name}-{SUFFIX}",
            attempt=attempt,
            lease_epoch=attempt,
            config=config or {},
        )

    def end(
        self,
        outcome: Outcome = Outcome.COMPLETED,
        state: State = State.COMPLETED,
        *,
        run_id: str = RUN_ID,
        **more: Any,
    ) -> None:
        self.tracker.end(run_id=run_id, outcome=outcome, state=state, **more)

    def wait_for(self, name: str, timeout_s: float = 60.0) -> Event:
        """Poll until an event of this name comes."""
        deadline = time.monotonic() + timeout_s
        while True:
            events = self.tracker.poll()
            self.events += events
            for event in events:
                if event["event"] == name:
                    return event
            descriptor = self.tracker.fileno()
            assert descriptor is not None, self.events
            assert time.monotonic() < deadline, self.events
            select.select([descriptor], [], [], 0.5)

    def close(self, timeout_s: float = 60.0) -> list[Event]:
        """Close in order; all events of this worker."""
        self.events += self.tracker.close(timeout_s)
        return self.events

    def warnings(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "warning"]


@pytest.fixture
def hire(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Makes workers whose trackers are ended with the test."""
    workers: list[Worker] = []

    def hire(**wandb: Any) -> Worker:
        workers.append(Worker(tmp_path / "tracker.log", **wandb))
        return workers[-1]

    yield hire
    for worker in workers:
        worker.tracker.close(0)
    assert orphans.end(orphans.RUN_VARIABLE, WANDB_ID) == [], "a W&B service was left behind"


def log_steps(run_dir: Path, first: int, last: int, *, offset: int = 0) -> int:
    """Write rows of these steps behind `offset`; return the new length."""
    with MetricsLog(run_dir / rundir.METRICS_FILE, offset=offset) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / (step + 1), "accuracy": float("nan") if step == 3 else 0.5})
        return log.sync()


def services() -> list[int]:
    """The W&B services of the run that are alive now."""
    entry = f"{orphans.RUN_VARIABLE}={WANDB_ID}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if entry in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
        except OSError:
            continue
    return found


# --- online --------------------------------------------------------------------------------


def test_one_run_with_its_id_name_group_config_and_each_step_once(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire(project="proj", tags=("digits",))
    worker.begin(run_dir, config={"trainer": {"lr": 0.1}})
    log_steps(run_dir, 1, 200)
    worker.end(value=0.25, summary={"best/accuracy": 0.9})
    events = worker.close()
    assert [e["event"] for e in events] == ["wandb", "done", "closed"]
    assert events[0]["wandb_url"] == f"{server.url}/me/proj/runs/{WANDB_ID}"
    (run,) = server.runs.values()
    assert (run.name, run.display_name, run.group, run.project) == (WANDB_ID, RUN_ID, "s", "proj")
    assert run.tags == ["digits"]
    assert run.config["trainer"]["value"] == {"lr": 0.1}
    assert run.steps == list(range(1, 201))
    assert [row["global_step"] for row in run.history] == run.steps
    assert run.history[4]["loss"] == 1 / 6
    assert run.exit_codes == [0]
    assert not run.is_preempting
    assert run.summary["best/accuracy"] == 0.9
    assert run.summary["sweeper/value"] == 0.25
    assert run.summary["sweeper/state"] == "completed"


def test_several_runs_of_one_worker_leave_nothing_in_the_temporary_directory(
    server: WandbServer, hire: Callable[..., Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    worker = hire()
    for number in (1, 2, 3):
        run_dir = tmp_path / "runs" / rundir.run_id("s", number)
        run_dir.mkdir(parents=True)
        log_steps(run_dir, 1, 10 * number)
        worker.begin(run_dir)
        worker.end(run_id=run_dir.name)
    worker.close()
    assert worker.warnings() == []
    assert [len(run.steps) for run in server.runs.values()] == [10, 20, 30]
    assert [run.exit_codes for run in server.runs.values()] == [[0], [0], [0]]
    assert list(temporary.iterdir()) == []


def test_a_killed_tracker_is_replaced_and_each_step_is_there_once(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire()
    worker.begin(run_dir)
    offset = log_steps(run_dir, 1, 300)
    worker.wait_for("wandb")
    assert server.wait_for(lambda: len(server.runs[WANDB_ID].steps) > 10)
    assert worker.tracker.pid is not None
    os.kill(worker.tracker.pid, signal.SIGKILL)
    worker.wait_for("warning")
    log_steps(run_dir, 301, 400, offset=offset)
    worker.end()
    worker.close()
    assert len(worker.warnings()) == 1
    assert server.runs[WANDB_ID].steps == list(range(1, 401))
    assert server.runs[WANDB_ID].exit_codes == [0]


def test_a_run_taken_over_after_everything_was_killed(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    first = hire()
    first.begin(run_dir)
    offset = log_steps(run_dir, 1, 250)
    log_steps(run_dir, 251, 300, offset=offset)
    first.wait_for("wandb")
    assert server.wait_for(lambda: len(server.runs[WANDB_ID].steps) > 10)
    assert first.tracker.pid is not None
    (service,) = services()
    os.kill(service, signal.SIGSTOP)  # it would outlive its tracker, and wake up later
    os.kill(first.tracker.pid, signal.SIGKILL)
    second = hire()
    log_steps(run_dir, 251, 260, offset=offset)
    second.begin(run_dir, attempt=2)
    second.wait_for("wandb")
    assert service not in services()
    log_steps(run_dir, 251, 400, offset=offset)
    second.end()
    second.close()
    assert second.warnings() == []
    assert server.runs[WANDB_ID].steps == list(range(1, 401))
    assert server.runs[WANDB_ID].exit_codes == [0]


def test_a_killed_service_is_replaced_and_each_step_is_there_once(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire()
    worker.begin(run_dir)
    offset = log_steps(run_dir, 1, 300)
    worker.wait_for("wandb")
    (service,) = services()
    os.kill(service, signal.SIGKILL)
    log_steps(run_dir, 301, 400, offset=offset)
    worker.end()
    worker.close()
    assert len(worker.warnings()) == 1
    assert server.runs[WANDB_ID].steps == list(range(1, 401))
    assert server.runs[WANDB_ID].exit_codes == [0]


def test_a_server_that_is_away_in_the_middle_has_each_step_once(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire()
    worker.begin(run_dir)
    offset = log_steps(run_dir, 1, 100)
    worker.wait_for("wandb")
    assert server.wait_for(lambda: server.runs[WANDB_ID].steps[-1:] == [99])
    with server.failing("file_stream", drop="before") as fault:
        offset = log_steps(run_dir, 101, 200, offset=offset)
        assert server.wait_for(lambda: fault.hits >= 1, timeout_s=30)
    with server.failing("file_stream", drop="after", times=1) as fault:
        log_steps(run_dir, 201, 300, offset=offset)
        worker.end()
        worker.close()
    assert fault.hits == 1
    assert worker.warnings() == []
    assert server.runs[WANDB_ID].steps == list(range(1, 301))
    assert server.violations == {}


def test_a_preempted_run_says_so_and_is_continued(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire()
    worker.begin(run_dir)
    offset = log_steps(run_dir, 1, 50)
    worker.end(Outcome.PREEMPTED, State.INTERRUPTED)
    worker.wait_for("done")
    run = server.runs[WANDB_ID]
    assert (run.exit_codes, run.is_preempting) == ([1], True)
    log_steps(run_dir, 51, 60, offset=offset)
    worker.begin(run_dir, attempt=2)
    worker.end()
    worker.close()
    assert worker.warnings() == []
    assert run.exit_codes == [1, 0]
    assert run.steps == list(range(1, 61))


def test_a_paused_worker_s_tracker_leaves_the_run_to_its_new_owner(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    paused, owner = hire(), hire()
    paused.begin(run_dir)
    offset = log_steps(run_dir, 1, 50)
    paused.wait_for("wandb")
    assert server.wait_for(lambda: len(server.runs[WANDB_ID].steps) == 49)
    rundir.write_marker(run_dir, attempt=2, lease_epoch=2, owner=processes.identify(), started_at="")
    with MetricsLog(run_dir / rundir.METRICS_FILE, offset=offset) as log:
        owner.begin(run_dir, attempt=2)
        owner.wait_for("wandb")
        for step in range(51, 101):
            log.write(step, {"loss": 0.0})
        paused.end(Outcome.LOST, State.INTERRUPTED)
        paused.close()
        owner.end()
        owner.close()
    assert owner.warnings() == []
    assert server.runs[WANDB_ID].steps == list(range(1, 101))
    assert server.runs[WANDB_ID].exit_codes == [0]


def test_never_gives_each_attempt_a_whole_run_of_its_own(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire(resume="never")
    worker.begin(run_dir)
    offset = log_steps(run_dir, 1, 10)
    worker.end(Outcome.PREEMPTED, State.INTERRUPTED)
    worker.wait_for("done")
    log_steps(run_dir, 11, 20, offset=offset)
    worker.begin(run_dir, attempt=2)
    worker.end()
    worker.close()
    assert {name: run.steps[-1] for name, run in server.runs.items()} == {WANDB_ID: 9, f"{WANDB_ID}-2": 20}
    assert server.runs[f"{WANDB_ID}-2"].steps == list(range(1, 21))


def test_must_without_a_run_on_the_server_is_refused_with_what_to_check(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path
) -> None:
    worker = hire(resume="must")
    log_steps(run_dir, 1, 10)
    worker.begin(run_dir, attempt=2)
    worker.end()
    events = worker.close()
    (refused,) = [event["text"] for event in events if event["event"] == "refused"]
    assert f"W&B run {WANDB_ID} does not exist" in refused
    assert "Check the run's id, the key, and its access to project sweeper" in refused
    assert not (run_dir / "wandb").exists() or not list(run_dir.glob("wandb/offline-run-*"))


def test_the_key_is_written_nowhere(
    server: WandbServer, hire: Callable[..., Worker], run_dir: Path, tmp_path: Path
) -> None:
    worker = hire()
    worker.begin(run_dir)
    log_steps(run_dir, 1, 10)
    worker.end()
    worker.close()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert [path for path in written if API_KEY.encode() in path.read_bytes()] == []
    assert API_KEY not in json.dumps(server.runs[WANDB_ID].config)


# --- offline -------------------------------------------------------------------------------


def steps_on_disk(run_dir: Path) -> dict[str, list[int]]:
    files = sorted(run_dir.glob(f"wandb/*run-*/run-{WANDB_ID}.wandb"), key=lambda path: path.stat().st_mtime)
    return {path.parent.name: list(wandb_files.history_steps(path)) for path in files}


def test_without_a_key_it_is_offline_and_whole(hire: Callable[..., Worker], run_dir: Path) -> None:
    worker = hire()
    worker.begin(run_dir)
    log_steps(run_dir, 1, 2500)  # more than one block of the file
    worker.end()
    events = worker.close()
    assert [e["event"] for e in events] == ["wandb", "done", "closed"]
    ((name, steps),) = steps_on_disk(run_dir).items()
    assert events[0]["wandb_dir"] == str(run_dir / "wandb" / name)
    assert name.startswith("offline-run-")
    assert steps == list(range(1, 2501))


def test_offline_attempts_hold_each_step_once_together(
    hire: Callable[..., Worker], run_dir: Path, server: WandbServer
) -> None:
    kills = 2
    offset = 0
    for attempt in range(1, kills + 1):
        worker = hire(mode="offline")
        worker.begin(run_dir, attempt=attempt)
        offset = log_steps(run_dir, 500 * attempt - 499, 500 * attempt, offset=offset)
        worker.wait_for("wandb")
        assert worker.tracker.pid is not None
        os.kill(worker.tracker.pid, signal.SIGKILL)
    worker = hire(mode="offline")
    worker.begin(run_dir, attempt=kills + 1)
    log_steps(run_dir, 500 * kills + 1, 500 * kills + 20, offset=offset)
    worker.end()
    worker.close()
    found = steps_on_disk(run_dir)
    assert [step for steps in found.values() for step in steps] == list(range(1, 500 * kills + 21))
    for name in found:  # W&B's own reader agrees, and the server ends up with each step once
        command = [sys.executable, "-m", "wandb", "sync", str(run_dir / "wandb" / name)]
        subprocess.run(command, cwd=run_dir.parent, capture_output=True, timeout=60)
    assert server.runs[WANDB_ID].steps == list(range(1, 500 * kills + 21))


def test_an_unreachable_server_makes_runs_offline_and_is_not_asked_each_time(
    hire: Callable[..., Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    worker = hire(init_timeout_s=1.0)
    for number in (1, 2):
        run_dir = tmp_path / "runs" / rundir.run_id("s", number)
        run_dir.mkdir(parents=True)
        before = time.perf_counter()
        worker.begin(run_dir)
        log_steps(run_dir, 1, 100)
        worker.end(run_id=run_dir.name)
        assert time.perf_counter() - before < 0.5, "the training waited for W&B"
    events = worker.close()
    assert [e["run_id"] for e in events if "offline-run" in e.get("wandb_dir", "")] == [
        "s.r.00001",
        "s.r.00002",
    ]
    assert len(worker.warnings()) == 2
    assert "logged offline" in worker.warnings()[0]
    assert "a short while ago" in worker.warnings()[1]
    found = steps_on_disk(tmp_path / "runs" / RUN_ID)
    steps = [steps for name, steps in found.items() if name.startswith("offline-run-")]
    assert steps == [list(range(1, 101))]


def test_a_server_that_goes_away_ends_the_waiting_in_bounded_time(
    hire: Callable[..., Worker], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker: Worker
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        worker = hire(finish_timeout_s=1.0)
        worker.begin(run_dir)
        worker.wait_for("wandb")
    log_steps(run_dir, 1, 100)
    before = time.monotonic()
    worker.end()
    worker.wait_for("done")
    assert time.monotonic() - before < 15
    assert worker.warnings() == [
        "W&B did not take all rows of s.r.00001 in time; `sweeper sync` sends them later"
    ]


def test_online_without_a_key_is_offline_with_a_warning(hire: Callable[..., Worker], run_dir: Path) -> None:
    worker = hire(mode="online")
    worker.begin(run_dir)
    log_steps(run_dir, 1, 10)
    worker.end()
    worker.close()
    assert "No API key configured" in worker.warnings()[0]
    assert list(steps_on_disk(run_dir).values()) == [list(range(1, 11))]


def test_a_key_that_is_not_valid_is_a_warning(
    hire: Callable[..., Worker], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    worker = hire()
    worker.begin(run_dir)
    log_steps(run_dir, 1, 10)
    worker.end()
    worker.close()
    assert "logged offline" in worker.warnings()[0]
    assert "too-short" not in worker.warnings()[0]
    assert list(steps_on_disk(run_dir).values()) == [list(range(1, 11))]


def test_a_key_in_netrc_makes_it_online(
    hire: Callable[..., Worker],
    run_dir: Path,
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {API_KEY}\n")
    worker = hire()
    worker.begin(run_dir)
    assert "wandb_url" in worker.wait_for("wandb")


def test_the_variable_can_disable_it(
    hire: Callable[..., Worker], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    worker = hire()
    worker.begin(run_dir)
    log_steps(run_dir, 1, 10)
    worker.end()
    assert [e["event"] for e in worker.close()] == ["done", "closed"]
    assert not (run_dir / "wandb").exists()


def test_a_broken_client_is_a_warning(
    hire: Callable[..., Worker], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "wandb.py").write_text("raise ImportError('half installed')")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    worker = hire()
    worker.begin(run_dir)
    log_steps(run_dir, 1, 10)
    worker.end()
    assert [e["event"] for e in worker.close()] == ["warning", "done", "closed"]
    assert "half installed" in worker.warnings()[0]
