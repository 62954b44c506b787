"""The promise itself: a sweep hit by 50 SIGKILLs ends as if nobody had touched it."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

TRIALS = 20
KILLS = 50
SEED = 20261122
EVERYBODY = (
    7  # launcher, template, two workers, two servers and a trainer: a storm of starts would test only starts
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_sigkills_to_random_processes_change_nothing(tmp_path):
    calm, storm = Sweep(tmp_path / "calm"), Sweep(tmp_path / "storm")
    assert calm.launch().wait(timeout=300) == 0

    kills = storm.kill_and_relaunch(KILLS, random.Random(SEED))

    assert kills == KILLS
    assert storm.count_trials() == calm.count_trials() == TRIALS
    assert storm.finals() == calm.finals()
    assert not (storm.root / "violations").exists(), "a run was executed by two at once"
    assert storm.leftovers() == []
    assert storm.processes() == []
    assert storm.open_leases() == 0
    assert storm.attempts() > TRIALS, "no attempt was interrupted: the storm tested nothing"


class Sweep:
    """One sweep in a directory of its own, driven by the public command only."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "outputs"
        root.mkdir()
        self.environment = {
            **os.environ,
            "STORM_DIR": str(root),
            "PYTHONPATH": str(Path(__file__).parent),
            "SWEEPER_DATA_DIR": str(self.data),
        }
        self.log = open(root / "log", "ab")  # noqa: SIM115

    def launch(self) -> subprocess.Popen[bytes]:
        overrides = [
            f"sweep.n_trials={TRIALS}", "sampler=random", "trainer._target_=storm_trainer.train", "trainer.epochs=12",
            "checkpoint.every_n_steps=15", "checkpoint.every_s=null", "tracking.wandb.mode=disabled",
        ]  # fmt: skip
        command = [sys.executable, "-m", "sweeper", "launch", "+sweep=simple", *overrides]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.root, stdout=self.log, stderr=self.log
        )

    def processes(self) -> list[int]:
        """Every process that belongs to this sweep: launcher, workers, servers, trainers, trackers."""
        mark = f"STORM_DIR={self.root}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if mark in environment:
                    found.append(int(entry.name))
        return found

    def kill_and_relaunch(self, kills: int, chance: random.Random) -> int:
        done, launcher = 0, self.launch()
        while done < kills or launcher.poll() != 0:
            code = launcher.poll()
            assert code in (None, 0, -signal.SIGKILL), f"the launcher gave up with {code}"
            assert code != 0 or done == kills, f"complete after {done} kills: give the storm more to do"
            if code is not None:
                launcher = self.launch()
            time.sleep(chance.uniform(0.1, 1.0))  # when the next failure comes is the point of the test
            targets = sorted(self.processes())
            if done < kills and len(targets) >= EVERYBODY:
                done += _kill(chance.choice(targets))
        return done

    def count_trials(self) -> int:
        study = optuna.load_study(study_name="simple", storage=f"sqlite:///{self.data}/sweeper.db")
        assert all(trial.state.name == "COMPLETE" for trial in study.trials)
        return len(study.trials)

    def finals(self) -> dict[str, object]:
        """Per trial: the final weights, optimizer and RNG bytes, the value, and the whole metrics log."""
        finals = {}
        for directory in sorted((self.data / "sweep/simple/runs").iterdir()):
            identity = json.loads((directory / "run.json").read_text())
            result = json.loads((directory / "result.json").read_text())
            last = max((directory / "checkpoints").glob("step_*"))
            files = {
                name: (last / name).read_bytes() for name in ("model.pth", "optimizer.pt", "rng_state.pt")
            }
            finals[identity["trial"]] = (
                identity["params"], result["value"], files, (directory / "metrics.jsonl").read_bytes(),
            )  # fmt: skip
        return finals

    def leftovers(self) -> list[str]:
        names = ("*.incomplete", ".*.tmp", ".tmp-*", ".aside-*", ".trash")
        return [str(path) for name in names for path in self.data.rglob(name)]

    def open_leases(self) -> int:
        return self._count(
            "SELECT count(*) FROM sweeper_run WHERE owner_token IS NOT NULL OR state IN ('running', 'interrupted')"
        )

    def attempts(self) -> int:
        return self._count("SELECT count(*) FROM sweeper_attempt")

    def _count(self, sql: str) -> int:
        with sqlite3.connect(self.data / "sweeper.db") as connection:
            return int(connection.execute(sql).fetchone()[0])


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1
