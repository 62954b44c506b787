"""Machines for tests of the mirror: directories that share nothing but a store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper import processes, rundir
from sweeper.mirror import indexes
from sweeper.mirror.bucket import Bucket

LIMIT_S = 120.0
TAG = "SWEEPER_MACHINE_TEST"
STEPS = 30
ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], what: str, *, log: Path | None = None) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    said = log.read_text() if log else ""
    raise AssertionError(f"in {LIMIT_S:.0f} s it did not happen that {what}\n{said}")


@dataclass(slots=True)
class Machine:
    """A directory in which `sweeper` is typed; its trainings go no further than `open_gate` says."""

    root: Path
    url: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.open_gate(10**9)

    @property
    def data(self) -> Path:
        return self.root / "outputs"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def open_gate(self, step: int) -> None:
        """Let trainings go on to a step, and no further."""
        (self.root / "gate.new").write_text(str(step))
        (self.root / "gate.new").replace(self.root / "gate")

    def launch(self, *overrides: str, n_trials: int = 3) -> subprocess.Popen[bytes]:
        """Launch the sweep; what it says goes to the log."""
        mirror = [f"mirror.url={self.url}", "mirror.every_s=0"] if self.url else []
        return self.start(
            "launch", "+sweep=simple", f"sweep.n_trials={n_trials}", "sampler=random", "launcher.n_workers=2",
            "trainer._target_=gated_trainer.train", "trainer.epochs=3", "checkpoint.every_n_steps=5", "checkpoint.every_s=null",
            "tracking.wandb.mode=disabled", "tracking.tensorboard.enabled=false", *mirror, *overrides,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, TAG: str(self.root), "GATE": str(self.root / "gate"), "OMP_NUM_THREADS": "1",
            "SWEEPER_DATA_DIR": str(self.data), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'train'}", **self.environment,
        }  # fmt: skip
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeper", *arguments], env=environment, cwd=self.root,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], code: int = 0) -> None:
        """Wait for a command, which must end with `code`."""
        assert process.wait(LIMIT_S) == code, self.log.read_text()

    def alive(self, *words: str) -> list[int]:
        """Everything that was started here and has not ended, if its command line has these words."""
        entry = f"{TAG}={self.root}".encode()
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                is_ours = entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                if is_ours and all(word in line for word in words):
                    found.append(pid)
        return [pid for pid in found if processes.start_ticks(pid) is not None]

    def signal(self, number: signal.Signals) -> None:
        """To everything that was started here."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """End with SIGKILL whatever is left."""
        while self.alive():
            self.signal(signal.SIGKILL)
            for process in self.started:
                process.poll()
        for process in self.started:
            process.wait(10)

    # --- what is seen from outside -------------------------------------------------------------

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Read the database, if it is there."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self.data / 'sweeper.db'}?mode=ro", uri=True)
            ) as connection:
                return connection.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return []

    def finals(self) -> dict[int, Any]:
        """By trial: parameters, value, the bytes of the last checkpoint, and the whole metrics log."""
        found = {}
        for directory in rundir.run_dirs(self.data, "simple"):
            identity = json.loads((directory / "run.json").read_text())
            result = json.loads((directory / "result.json").read_text())
            last = max((directory / "checkpoints").glob("step_*"))
            files = [(last / name).read_bytes() for name in ("model.pth", "optimizer.pt", "rng_state.pt")]
            metrics = (directory / "metrics.jsonl").read_bytes()
            found[identity["trial"]] = (identity["params"], result["value"], last.name, files, metrics)
        return found


def copied_steps(bucket: Bucket) -> dict[str, int]:
    """Run → newest step in the copy; -1 when it is known and has no checkpoint."""
    runs = {indexes.run_of(name) for name in bucket.names("runs/") if indexes.order(name)}
    found = {run_id: indexes.read_newest(bucket, run_id)[0] for run_id in sorted(runs)}
    return {run_id: -1 if index.step is None else index.step for run_id, index in found.items() if index}
