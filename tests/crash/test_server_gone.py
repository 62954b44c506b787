"""A PostgreSQL that is killed in the middle of a sweep: trainings go on, and nothing is counted against them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest

from sweeper import embedded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_trainings_outlive_a_killed_server(tmp_path: Path) -> None:
    """Heartbeats fail and are repeated; when the server is back the same attempts complete."""
    with tempfile.TemporaryDirectory(prefix="sweeper-test-") as place:
        Path(place).chmod(0o711)
        server = embedded.Server(Path(place) / "postgres")
        url = server.up()
        environment = {
            **os.environ, "SWEEPER_STORAGE": url, "SWEEPER_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        launch = subprocess.Popen(
            [
                sys.executable, "-m", "sweeper", "launch", "+sweep=simple", "storage=postgres", "sweep.n_trials=2",
                "trainer.epochs=60", "lease.heartbeat_s=0.3", "lease.ttl_s=60", "tracking.wandb.mode=disabled",
            ],
            cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert launch.stderr is not None
        try:
            while steps_of(url) < 2:
                assert launch.poll() is None
            os.kill(int((server.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
            said = next(line for line in launch.stderr if "could not be renewed" in line)
            assert "Nothing is lost" in said
            server.up()
            rest = launch.stderr.read()
            assert launch.wait(timeout=120) == 0, rest
            with psycopg.connect(url) as connection:
                ends = connection.execute("SELECT outcome FROM sweeper_attempt").fetchall()
            assert ends == [("completed",)] * 2, rest
        finally:
            launch.kill()
            launch.wait()
            server.down()


def steps_of(url: str) -> int:
    """How many runs have committed a checkpoint; none while there are no tables yet."""
    try:
        with psycopg.connect(url) as connection:
            found = connection.execute(
                "SELECT count(*) FROM sweeper_run WHERE checkpoint_step > 0"
            ).fetchone()
    except psycopg.errors.UndefinedTable:
        return 0
    return int(found[0]) if found else 0
