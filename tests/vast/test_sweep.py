"""A real sweep on VastAI's loopback: installed, interrupted, replaced, resumed from its mirror, and ended."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from vast_server import VastServer
from wandb_server import API_KEY, WandbServer

from sweeper.errors import EXIT_NOT_WELL, EXIT_OK
from sweeper.mirror import indexes
from sweeper.mirror.bucket import Bucket

pytestmark = pytest.mark.slow

VAST = {
    "launcher": "vast", "launcher.python": sys.executable, "launcher.poll_s": "0.5", "launcher.linger_s": "0.2",
    "tracking.wandb.mode": "disabled", "tracking.tensorboard.enabled": "false",
}  # fmt: skip


BACKEND = """
import os, zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "tiny-1-py3-none-any.whl"
    files = {
        "tiny.pth": os.getcwd(),
        "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n",
        "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr("tiny-1.dist-info/RECORD", "".join(f"{path},,\\n" for path in files))
    return name
"""
"""Builds without a package from elsewhere."""


@pytest.fixture(autouse=True)
def _heard_out(server: VastServer) -> None:
    server.is_heard_out = True


def overrides(**more: str) -> list[str]:
    return [f"{key}={value}" for key, value in {**VAST, **more}.items()]


def steps(url: str) -> dict[str, tuple[int | None, bool, int]]:
    """Run → newest step in the copy, whether it is final, number of its attempt."""
    bucket = Bucket.open(url, "simple")
    run_ids = {indexes.run_of(name) for name in bucket.names("runs/") if name.endswith(".json")}
    found = {run_id: indexes.read_newest(bucket, run_id)[0] for run_id in run_ids}
    return {run_id: (i.step, i.is_final, i.attempt) for run_id, i in found.items() if i is not None}


def test_an_interrupted_sweep_goes_on_from_its_mirror_on_another_instance(
    sweeper: Any, server: VastServer, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/mirror"
    sweep = overrides(**{
        "mirror.url": url, "mirror.every_s": "0.5", "checkpoint.every_n_steps": "20", "checkpoint.every_s": "null",
        "sweep.n_trials": "2", "trainer.max_steps": "120", "sweep.params": "{trainer.lr: \"interval(0.001, 0.01)\"}",
        "launcher.interruptible": "true",
        "launcher.save": "['true']",  # the instances share this disk
    })  # fmt: skip
    interrupted: list[Any] = []

    def outbid() -> None:
        server.until(lambda: any((step or 0) >= 40 for step, _, _ in steps(url).values()), seconds=90)
        (box,) = server.there()
        server.interrupt(box)
        interrupted.append(steps(url))

    helper = threading.Thread(target=outbid, daemon=True)
    helper.start()
    said = sweeper("launch", "+sweep=simple", *sweep)
    helper.join()
    assert (said.code, server.running(), server.most_at_once) == (EXIT_OK, [], 1), said.err + server.logs()
    assert len(server.boxes) == 2
    ((before, is_final, _),) = [at for at in interrupted[0].values() if not at[1]][:1]
    assert 0 < before < 120
    assert not is_final
    after = steps(url)
    assert {run: at[:2] for run, at in after.items()} == {
        "simple.r.00000": (120, True),
        "simple.r.00001": (120, True),
    }
    assert max(attempt for _, _, attempt in after.values()) >= 2, "one of them was resumed"
    _, second = server.boxes.values()
    log = second.log.read_text()
    assert "found a copy of sweep simple" in log
    assert "finished: done: the sweep is complete" in log


def test_an_interrupted_sweep_goes_on_from_wandb_on_another_instance(
    sweeper: Any, server: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
        sweep = overrides(**{
            "tracking.wandb.mode": "online", "tracking.wandb.upload_checkpoints": "last",
            "checkpoint.every_n_steps": "25", "checkpoint.every_s": "null", "sweep.n_trials": "1",
            "trainer.max_steps": "100", "sweep.params": "{trainer.lr: \"interval(0.001, 0.01)\"}",
            "launcher.env": "[WANDB_BASE_URL,WANDB_API_KEY,WANDB__FILE_STREAM_TRANSMIT_INTERVAL]",
        })  # fmt: skip

        def outbid() -> None:
            server.until(
                lambda: any(
                    a.state == "COMMITTED" and a.type == "sweeper-checkpoint" for a in wandb.artifacts
                ),
                seconds=90,
            )
            (box,) = server.there()
            server.interrupt(box)

        helper = threading.Thread(target=outbid, daemon=True)
        helper.start()
        said = sweeper("launch", "+sweep=simple", *sweep)
        helper.join()
        assert (said.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 2), said.err + server.logs()
        assert server.most_at_once == 1
        (run,) = wandb.runs.values()
        assert run.state == "finished"
        assert not wandb.violations


def test_clone_environment_and_install_are_real_and_a_failing_training_ends_the_instance(
    sweeper: Any, server: VastServer, tmp_path: Path
) -> None:
    """Clone, environment and `pip install -e` for real, of a small project that has a `sweeper` of its own."""
    project = tmp_path / "project"
    (project / "sweeper").mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (project / "backend.py").write_text(BACKEND)
    (project / "sweeper/__init__.py").touch()
    (project / "sweeper/__main__.py").write_text(
        "import importlib.metadata, os, sys\n"
        "print('installed', importlib.metadata.version('tiny'), sys.prefix != sys.base_prefix)\n"
        "os.makedirs(os.environ['SWEEPER_DATA_DIR'] + '/sweep/simple/runs')\nsys.exit(1)\n"
    )
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "--quiet", "-b", "night"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    said = sweeper(
        "launch", "+sweep=simple",
        *overrides(**{
            "launcher.python": "null", "launcher.git_url": f"file://{project}", "launcher.git_branch": "night",
            "launcher.setup": "null",
            "launcher.save": "['touch \"$SWEEPER_WORKSPACE/saved\"']",
        }),
    )  # fmt: skip
    (box,) = server.boxes.values()
    assert (said.code, server.running()) == (EXIT_NOT_WELL, []), said.err + server.logs()
    assert "failed: sweeper launch: exit 1" in said.err
    assert "installed 1 True" in box.log.read_text()
    assert (box.work / "saved").exists()
    assert (box.work / "sweeper-simple/repo/.git").is_dir()
