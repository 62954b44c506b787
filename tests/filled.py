"""A data directory with a database and run directories, filled by hand: what readers are tested on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sweeper import checkpoints, manifests, processes, rundir, schema
from sweeper.checkpoints import void
from sweeper.records import ProcessId

NOW_S = 1_700_000_000.0
CONFIG = b"seed: 1\n"


class Filled:
    """Writes rows and files with sensible defaults; any column can be given by name."""

    def __init__(self, data_dir: Path, *, version: str | None = schema.HEAD) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir = data_dir
        self.path = data_dir / "sweeper.db"
        self.url = f"sqlite:///{self.path}"
        self._engine = sa.create_engine(self.url)
        sa.event.listen(self._engine, "connect", lambda raw, _: void(raw.execute("PRAGMA synchronous=OFF")))
        schema.metadata.create_all(self._engine)
        with self._engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE sweeper_version (version_num VARCHAR(32) NOT NULL)")
            if version:
                connection.exec_driver_sql(f"INSERT INTO sweeper_version VALUES ('{version}')")
        self._sweeps: dict[str, int] = {}

    def sweep(self, name: str = "simple", **columns: Any) -> str:
        """Add a sweep of 20 trials that maximizes accuracy."""
        self._sweeps[name] = len(self._sweeps) + 1
        defaults = {
            "sweep_id": self._sweeps[name],
            "name": name,
            "study_id": self._sweeps[name],
            "seed": 1,
            "n_trials": 20,
            "metric": "accuracy",
            "direction": "maximize",
            "config": json.dumps({"sweep": {"name": name}}),
            "created_at": NOW_S,
        }
        self._insert(schema.sweep, {**defaults, **columns})
        return name

    def run(self, number: int, *, sweep: str = "simple", state: str = "completed", **columns: Any) -> str:
        """Add a run; a running one is owned by this process, with a lease that never ends."""
        if sweep not in self._sweeps:
            self.sweep(sweep)
        run_id = rundir.run_id(sweep, number)
        defaults = {
            "run_id": run_id,
            "sweep_id": self._sweeps[sweep],
            "number": number,
            "trial_id": number + 1,
            "trial": number,
            "params": json.dumps({"trainer.lr": 0.01, "trainer.width": 32}),
            "seed": 7,
            "threads": 1,
            "path": rundir.relative_path(sweep, number),
            "wandb_run_id": f"{run_id}.abcdef01",
            "state": state,
            "lease_epoch": 1,
            "owner": json.dumps(asdict(processes.identify())),
            "lease_until": 4e9 if state == "running" else None,
            "attempts": 1,
            "created_at": NOW_S,
            "updated_at": NOW_S,
        }
        self._insert(schema.run, {**defaults, **columns})
        return run_id

    def attempt(self, run_id: str, attempt: int = 1, **columns: Any) -> None:
        """Add an attempt of a run."""
        defaults = {
            "run_id": run_id,
            "attempt": attempt,
            "lease_epoch": attempt,
            "owner": json.dumps(asdict(processes.identify())),
            "started_at": NOW_S + 60 * attempt,
        }
        self._insert(schema.attempt, {**defaults, **columns})

    def directory(self, run_id: str, *, params: dict[str, Any] | None = None, marker: bool = False) -> Path:
        """Create the run's directory as a worker would."""
        sweep, _, number = run_id.partition(".r.")
        run_dir = self.data_dir / rundir.relative_path(sweep, int(number))
        identity = rundir.Identity(
            run_id=run_id,
            sweep=sweep,
            number=int(number),
            trial=int(number),
            params=params or {"trainer.lr": 0.01, "trainer.width": 32},
            seed=7,
            threads=1,
            wandb_run_id=f"{run_id}.abcdef01",
            config_digest=manifests.digest(CONFIG),
            code_version="test",
            created_at="2025-01-31T12:00:00Z",
        )
        rundir.create(run_dir, identity, config=CONFIG, overrides=rundir.overrides_yaml(identity.params))
        if marker:
            owner = processes.identify()
            rundir.write_marker(
                run_dir, attempt=1, lease_epoch=1, owner=owner, started_at="2025-01-31T12:00:00Z"
            )
        return run_dir

    def _insert(self, table: sa.Table, columns: dict[str, Any]) -> None:
        with self._engine.begin() as connection:
            connection.execute(table.insert(), columns)

    def execute(self, sql: str) -> None:
        """Run one statement of SQL."""
        with self._engine.begin() as connection:
            connection.exec_driver_sql(sql)


def commit_checkpoint(run_dir: Path, *, step: int, lease_epoch: int = 1, weights: str = "model.pth") -> Path:
    """Commit a small valid checkpoint and return its directory."""
    draft = checkpoints.Draft(
        run_dir / rundir.CHECKPOINTS_DIR,
        run_id=run_dir.name,
        step=step,
        lease_epoch=lease_epoch,
        lineage=((lease_epoch, 0),),
        parent_step=None,
        config_digest=manifests.digest(CONFIG),
    )
    draft.add_bytes(weights, b"weights of step %d" % step)
    checkpoints.commit(
        draft,
        check_lease=lambda: None,
        record=lambda manifest: None,
        committed_at="2025-01-31T12:00:00Z",
    )
    return run_dir / rundir.CHECKPOINTS_DIR / checkpoints.step_name(step)


def dead_process() -> ProcessId:
    """The identity of a process of this machine that is gone for certain."""
    me = asdict(processes.identify())
    return ProcessId(**{**me, "start_ticks": me["start_ticks"] - 1})
