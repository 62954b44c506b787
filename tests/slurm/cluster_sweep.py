"""A sweep on the testbed as a user starts it, and what the tests ask about it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from testbed import Testbed

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0


def until(condition: Any, what: str, *, tell: Any = lambda: "") -> Any:
    """Wait until something is so; returns what the condition returned."""
    deadline = time.monotonic() + LIMIT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"in {LIMIT_S:.0f} s it did not happen that {what}\n{tell()}"
        time.sleep(0.05)
    return answer


@dataclass
class ClusterSweep:
    """One sweep, in a directory of its own.

    Attributes:
        more: Environment variables of everything that is started for it.
    """

    testbed: Testbed | None
    place: Path
    name: str = "on_slurm"
    more: dict[str, str] = field(default_factory=dict)

    @property
    def data_dir(self) -> Path:
        return self.place / "data"

    @property
    def storage(self) -> str:
        return f"sqlite:///{self.data_dir}/sweeper.db"

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SWEEPER_", "SLURM_"))}
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "slurm", ROOT / "tests" / "train")))
        mine = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "WATCHED_DIR": str(self.place),
            "HOME": str(self.place),
        }
        cluster = dict(self.testbed.environment) if self.testbed else {}
        return {**kept, **mine, **cluster, "SWEEPER_DATA_DIR": str(self.data_dir), **self.more}

    def sweeper(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command of ours."""
        self.place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "sweeper", *arguments], env=self.environment, cwd=self.place, capture_output=True, text=True
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def launch(self, *overrides: str, launcher: str = "slurm", check: bool = True) -> Any:
        """Launch it; the trainings are small ones of the reference trainer."""
        return self.sweeper(
            "launch", "+sweep=simple", f"sweep.name={self.name}", f"launcher={launcher}", "sampler=random",
            "trainer._target_=paced_trainer.train", "checkpoint.every_n_steps=20", "tracking.wandb.mode=disabled",
            "tracking.tensorboard.enabled=false", *overrides, check=check,
        )  # fmt: skip

    # --- what became of it -----------------------------------------------------------------

    def rows(self, sql: str) -> list[dict[str, Any]]:
        with sqlite3.connect(f"file:{self.data_dir}/sweeper.db?mode=ro", uri=True, timeout=20) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql)]

    def runs(self) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM sweeper_run ORDER BY number")

    def attempts(self) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM sweeper_attempt ORDER BY run_id, attempt")

    def outcomes(self) -> Counter[str]:
        return Counter(row["outcome"] for row in self.attempts())

    def training(self, *, step: int = 20) -> dict[str, dict[str, Any]]:
        """Worker → the run it trains now, of those that are at `step` at least."""
        live = (row for row in self.runs() if row["state"] == "running" and row["processes"])
        return {row["worker"]: row for row in live if (row["checkpoint_step"] or 0) >= step}

    def weights(self) -> dict[int, str]:
        """Trial → digest of the final weights, of completed runs."""
        found = {}
        for row in self.runs():
            if row["state"] == "completed":
                directory = self.data_dir / row["path"] / "checkpoints" / f"step_{row['checkpoint_step']:08d}"
                found[row["trial"]] = blake3((directory / "model.pth").read_bytes()).hexdigest()
        return found

    def violations(self) -> list[str]:
        file = self.place / "violations"
        return file.read_text().splitlines() if file.exists() else []

    def logs(self) -> str:
        """What the workers printed."""
        files = sorted((self.data_dir / "sweep" / self.name / "slurm").glob("*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    def is_complete(self) -> bool:
        status = self.rows(
            "SELECT n_trials, (SELECT count(*) FROM sweeper_run WHERE state='completed') AS done FROM sweeper_sweep"
        )
        return bool(status) and status[0]["n_trials"] == status[0]["done"]

    # --- SLURM -----------------------------------------------------------------------------

    def job(self, worker: str) -> str:
        """The job of a worker, as scontrol takes it."""
        return worker.removeprefix("slurm:")

    def node(self, worker: str) -> str:
        assert self.testbed is not None
        return self.testbed.run("squeue", "--noheader", f"--jobs={self.job(worker)}", "--format=%N").strip()

    def jobs(self, *states: str) -> list[str]:
        """Jobs of this sweep in these states, array members one by one."""
        assert self.testbed is not None
        return self.testbed.run(
            "squeue", "--noheader", "--array", f"--name=sweeper-{self.name}", f"--states={','.join(states)}", "--format=%i"
        ).split()  # fmt: skip


def kill(process: dict[str, Any]) -> None:
    """SIGKILL a process that the database tells of."""
    os.kill(process["pid"], signal.SIGKILL)


def trainer_of(run: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run["processes"])[0]
    return found


def owner_of(run: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run["owner"])
    return found
