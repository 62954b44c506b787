"""The examples run, can be killed, and are what docs/own_loop.md shows of them."""

from __future__ import annotations

import difflib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crash import mini
from crash.mini import final, finish

from sweeper.errors import EXIT_RELEASED
from sweeper.torch import find_latest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "own_loop.md"
LAST_STEP = 470

STRUCK = """
import os, runpy, sys, torch
path, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
step, count = torch.optim.AdamW.step, 0
def counted(*args, **kwargs):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), number)
    return step(*args, **kwargs)
torch.optim.AdamW.step = counted
runpy.run_path(path, run_name="__main__")
"""
"""Runs a script whose optimizer sends it a signal in its so-many-th step."""


def run(
    name: str, where: Path, *, at: int = 0, number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    where.mkdir(exist_ok=True)
    command = [sys.executable, "-c", STRUCK, str(EXAMPLES / name), str(at), str(int(number))]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    where = tmp_path_factory.mktemp("undisturbed")
    done = run("resumable.py", where)
    assert done.returncode == 0, done.stderr
    return contents(where)


def contents(where: Path) -> dict[str, bytes]:
    newest = find_latest(where / "digits")
    assert newest is not None
    assert newest.name == f"step_{LAST_STEP:08d}"
    names = ("model.pth", "optimizer.pt", "rng_state.pt", "state.json")
    return {
        "metrics": (where / "digits" / "metrics.jsonl").read_bytes(),
        **{name: (newest / name).read_bytes() for name in names},
    }


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert undisturbed["metrics"].count(b"\n") == 10
    for at in (20, 100, 130):  # before any checkpoint, in the third epoch, in the fourth
        assert run("resumable.py", tmp_path, at=at).returncode == -signal.SIGKILL
    done = run("resumable.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    stopped = run("resumable.py", tmp_path, at=60, number=signal.SIGTERM)
    assert stopped.returncode == EXIT_RELEASED, stopped.stderr
    done = run("resumable.py", tmp_path)
    assert "going on from step 60" in done.stdout
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_the_plain_one_trains(tmp_path: Path) -> None:
    assert run("plain.py", tmp_path).stdout.count("epoch") == 10


@pytest.mark.slow
def test_the_same_function_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    with mini.fast_dir() as base:
        place = mini.new_place(
            base / "sweep", trainer={"_target_": "resumable.train", "lr": 0.01, "epochs": 2}
        )
        assert finish(place) == 0, place.printed()
        assert (final(place).state, final(place).step) == ("completed", 94)


# --- the page --------------------------------------------------------------------------------


def test_the_page_shows_the_difference() -> None:
    plain, resumable = (
        (EXAMPLES / name).read_text().splitlines(keepends=True) for name in ("plain.py", "resumable.py")
    )
    assert len(plain) == int(re.findall(r"in (\d+) lines", PAGE.read_text())[0])
    lines = difflib.unified_diff(plain, resumable, "examples/plain.py", "examples/resumable.py", n=1)
    assert f"```diff\n{''.join(lines)}```\n" in PAGE.read_text()


def test_the_lines_are_counted() -> None:
    page = PAGE.read_text()
    table = [line.split("|") for line in page.splitlines() if re.match(r"\| [A-Za-z].*\| \d+ \|", line)]
    counted = {cells[1].strip(): int(cells[2]) for cells in table}
    marks = [
        [int(n) for n in re.findall(r" # (\d+)$", block, flags=re.MULTILINE)]
        for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    ]
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in marks)
    lightning, transformers, own, lightning_alone, ray = map(len, marks)
    assert counted == {
        "a loop of one's own, in a sweep": own - 2,
        "a loop of one's own, `open_run`": own,
        "Lightning with `Resumable`": lightning,
        "transformers with `ResumableTrainer`": transformers,
        "Lightning alone": lightning_alone,
        "Ray Tune": ray,
    }
