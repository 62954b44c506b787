"""Importing the commands, and listing runs, loads nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filled import Filled, dead_process

HEAVY = (
    "torch",
    "wandb",
    "optuna",
    "sqlalchemy",
    "hydra",
    "submitit",
    "numpy",
    "rich",
    "omegaconf",
    "blake3",
)
SLOW = ("dataclasses", "typing", "inspect", "socket", "shutil", "ctypes")
"""Part of Python, but each costs a twentieth or more of the tenth of a second that `list` has."""


def loaded_after(code: str) -> set[str]:
    """Modules that are loaded by `code` in a new process and not by Python's own start."""
    script = (
        f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before), file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    return set(process.stderr.split())


@pytest.mark.parametrize("module", ["sweeper", "sweeper.cli"])
def test_importing_is_light(module: str) -> None:
    assert not loaded_after(f"import {module}") & {*HEAVY, *SLOW}


def test_the_adapters_are_extras() -> None:
    loaded = loaded_after("import sweeper.torch")
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "torchmetrics", "transformers", "accelerate"}


@pytest.mark.parametrize("flags", [[], ["--json"], ["--incomplete"], ["simple", "--state", "running"]])
def test_listing_is_light(tmp_path: Path, flags: list[str]) -> None:
    filled = Filled(tmp_path)
    filled.run(0, state="running")
    filled.run(1, state="running", owner=json.dumps(vars_of(dead_process())))
    filled.run(2, state="completed", value=0.5)
    arguments = ["list", *flags, "--storage", filled.url]
    loaded = loaded_after(f"from sweeper.cli import main; assert main({arguments!r}) == 0")
    assert not loaded & set(HEAVY)
    assert not loaded & set(SLOW)


def vars_of(process: object) -> dict[str, object]:
    return {name: getattr(process, name) for name in process.__slots__}  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["status", "show", "best", "logs", "verify"])
def test_looking_on_needs_no_framework(tmp_path: Path, verb: str) -> None:
    filled = Filled(tmp_path)
    run_id = filled.run(0, value=0.5)
    filled.directory(run_id)
    name = {"status": "simple", "best": "simple"}.get(verb, run_id)
    arguments = [verb, name, "--data-dir", str(tmp_path)]
    loaded = loaded_after(f"from sweeper.cli import main; assert main({arguments!r}) == 0").difference(
        {"blake3"}
    )
    assert not loaded & set(HEAVY)
