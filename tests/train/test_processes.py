"""Real processes, killed and stopped: who dies with whom, and what of a sleeper counts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAST_LEASE = ["lease.heartbeat_s=0.3", "lease.ttl_s=1.5", "lease.grace_s=10"]


class Sweep:
    """One run of the slow trainer in a directory of its own, driven by the public command."""

    def __init__(self, root: Path, **environment: str) -> None:
        root.mkdir()
        self.root, self.data = root, root / "outputs"
        self.environment = {
            **os.environ, "PYTHONPATH": str(Path(__file__).parent), "SWEEPER_DATA_DIR": str(self.data), **environment,
        }  # fmt: skip
        self.started: list[subprocess.Popen[str]] = []

    def sweeper(self, *words: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "sweeper", *words]
        process = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def launch(self, *overrides: str) -> subprocess.Popen[str]:
        return self.sweeper(
            "launch", "+sweep=simple", "sweep.n_trials=1", "launcher.n_workers=1", "trainer._target_=slow_trainer.train",
            "checkpoint.every_n_steps=5", "checkpoint.every_s=null", "tracking.wandb.mode=disabled",
            "tracking.tensorboard.enabled=false", *FAST_LEASE, *overrides,
        )  # fmt: skip

    def row(self, sql: str) -> tuple:
        try:
            with sqlite3.connect(f"file:{self.data}/sweeper.db?mode=ro", uri=True) as connection:
                return connection.execute(sql).fetchone() or ()
        except sqlite3.OperationalError:
            return ()

    def wait_for_step(self, step: int) -> None:
        until(
            lambda: (
                (self.row("SELECT checkpoint_step FROM sweeper_run") or (None,))[0]
                not in (None, *range(step))
            )
        )

    def worker(self) -> int:
        return json.loads(self.row("SELECT owner FROM sweeper_run")[0])["pid"]

    def trainer(self) -> int:
        return json.loads(self.row("SELECT processes FROM sweeper_run")[0])[0]["pid"]

    def outcomes(self) -> list[str]:
        with sqlite3.connect(self.data / "sweeper.db") as connection:
            return [
                row[0] for row in connection.execute("SELECT outcome FROM sweeper_attempt ORDER BY attempt")
            ]

    def final(self) -> tuple[bytes, bytes, bytes]:
        directory = self.data / "sweep/simple/runs/simple.r.00000"
        last = max((directory / "checkpoints").glob("step_*"))
        assert not list(self.data.rglob("*.incomplete")), "a marker outlived its run"
        return (
            (last / "model.pth").read_bytes(),
            (last / "rng_state.pt").read_bytes(),
            (directory / "metrics.jsonl").read_bytes(),
        )

    def end(self) -> None:
        mark = f"SWEEPER_DATA_DIR={self.data}".encode()
        for pid in [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]:
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        for process in self.started:
            process.wait()


def until(is_so: Callable[[], bool], *, limit_s: float = 90.0) -> None:
    """Wait for a condition; fail loudly when it never comes."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, bytes]:
    sweep = Sweep(tmp_path_factory.mktemp("calm") / "sweep")
    assert sweep.launch().wait(timeout=120) == 0
    return sweep.final()


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path / "sweep")
    yield made
    made.end()


def test_a_killed_worker_takes_its_trainer_along_and_the_next_goes_on(sweep: Sweep, calm: tuple) -> None:
    launcher = sweep.launch()
    sweep.wait_for_step(5)
    worker, trainer = sweep.worker(), sweep.trainer()
    os.kill(worker, signal.SIGKILL)
    until(lambda: is_gone(trainer), limit_s=5)
    assert launcher.wait(timeout=120) == 0
    assert sweep.outcomes() == ["lost", "completed"]
    assert sweep.final() == calm


@pytest.mark.parametrize("also_trainer", [False, True], ids=["worker", "worker and trainer"])
def test_nothing_of_a_sleeper_counts_when_it_wakes(sweep: Sweep, calm: tuple, also_trainer: bool) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare: the next worker must not be able to see, and kill, the sleeper")
    assert sweep.launch("--detach").wait(timeout=60) == 0
    sweep.wait_for_step(5)
    worker, trainer = sweep.worker(), sweep.trainer()
    os.kill(worker, signal.SIGSTOP)
    if also_trainer:
        os.kill(trainer, signal.SIGSTOP)

    # Another PID namespace with the same boot id: only a heartbeat that stands still proves anything.
    heir = sweep.sweeper("worker", "simple", prefix=("unshare", "--pid", "--fork", "--mount-proc"))
    until(lambda: sweep.row("SELECT count(*) FROM sweeper_attempt") == (2,))
    if not also_trainer:
        until(lambda: is_gone(trainer), limit_s=30)  # it passed the deadline of the last heartbeat
    sweep.wait_for_step(30)
    for pid in (worker, trainer)[: 2 if also_trainer else 1]:
        os.kill(pid, signal.SIGCONT)  # the sleepers wake while the heir trains

    assert heir.wait(timeout=120) == 0, heir.stdout.read()
    until(lambda: is_gone(worker) and is_gone(trainer), limit_s=30)
    assert sweep.outcomes() == ["lost", "completed"]
    assert sweep.final() == calm


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("SIGKILL", "lost"),
        ("SIGSEGV", "crashed"),
        ("raise", "crashed"),
        ("exit", "crashed"),
        ("memory", "oom"),
    ],
)
def test_however_a_trainer_ends_it_is_an_outcome_of_the_attempt(
    tmp_path: Path, calm: tuple, how: str, outcome: str
) -> None:
    sweep = Sweep(tmp_path / "sweep", SLOW_END=how)
    try:
        assert sweep.launch("retry.max_oom=1").wait(timeout=120) == 0
        assert sweep.outcomes() == [outcome, "completed"]
        assert sweep.final() == calm
        if how == "raise":
            detail = sweep.row("SELECT detail FROM sweeper_attempt WHERE attempt=1")[0]
            assert "on purpose" in detail
            assert "Traceback" in detail
    finally:
        sweep.end()


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_stopped_launch_releases_its_runs_and_says_how_to_go_on(
    sweep: Sweep, calm: tuple, signum: int, code: int
) -> None:
    launcher = sweep.launch()
    sweep.wait_for_step(5)
    trainer = sweep.trainer()
    launcher.send_signal(signum)
    assert launcher.wait(timeout=60) == code
    assert "resume simple" in launcher.stdout.read()
    assert is_gone(trainer)
    assert sweep.row("SELECT state, outcome FROM sweeper_run") == ("interrupted", "preempted")
    assert sweep.sweeper("resume", "simple").wait(timeout=120) == 0
    assert sweep.final() == calm


def test_a_killed_launcher_makes_its_workers_release_and_end(sweep: Sweep) -> None:
    launcher = sweep.launch()
    sweep.wait_for_step(5)
    worker, trainer = sweep.worker(), sweep.trainer()
    launcher.kill()
    until(lambda: is_gone(worker) and is_gone(trainer), limit_s=30)
    assert sweep.row("SELECT state, outcome FROM sweeper_run") == ("interrupted", "preempted")


def test_a_hung_trainer_is_ended_and_replaced(tmp_path: Path, calm: tuple) -> None:
    sweep = Sweep(tmp_path / "sweep", SLOW_END="SIGSTOP")
    try:
        assert sweep.launch("lease.progress_s=3").wait(timeout=120) == 0
        assert sweep.outcomes() == ["lost", "completed"]
        assert sweep.final() == calm
    finally:
        sweep.end()
