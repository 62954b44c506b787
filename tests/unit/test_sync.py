"""What `sweeper sync` takes for whole, and what W&B's ids name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeper import rundir, sync
from sweeper.errors import ConfigError, NotWell
from sweeper.tracking import MetricsLog, TrackingSettings, WandbSettings
from sweeper.tracking.wandb_source import Wanted


def run_of(tmp_path: Path, state: str, *, steps: int = 20, attempts: int = 2) -> Any:
    with MetricsLog(tmp_path / rundir.METRICS_FILE) as log:
        for step in range(0, steps + 1, 5):
            log.write(step, {"loss": 1.0})
    return {"path": ".", "state": state, "wandb_run_id": "s.r.00001.abcdefgh", "attempts": attempts}


@pytest.mark.parametrize(
    ("state", "there", "is_whole"),
    [
        ("completed", (20, "finished"), True),
        ("completed", (20, "crashed"), False),
        ("completed", (15, "finished"), False),
        ("failed", (20, "crashed"), False),
        ("failed", (20, "failed"), True),
        ("cancelled", (20, "preempted"), False),
        ("superseded", (20, "failed"), True),
        ("interrupted", (15, "preempted"), True),  # the newest step may have more rows: it is held back
        ("interrupted", (10, "preempted"), False),
        ("completed", (-1, ""), False),
    ],
)
def test_what_is_whole(tmp_path: Path, state: str, there: tuple[int, str], is_whole: bool) -> None:
    assert sync._is_whole(run_of(tmp_path, state), there, data_dir=tmp_path) is is_whole


def test_never_is_looked_for_under_the_id_of_its_last_attempt(tmp_path: Path) -> None:
    run = run_of(tmp_path, "completed", attempts=3)
    there = {"s.r.00001.abcdefgh": (5, "crashed"), "s.r.00001.abcdefgh-3": (20, "finished")}
    never = TrackingSettings(WandbSettings(resume="never"))
    assert sync._there(run, never, there) == (20, "finished")
    assert sync._there(run, TrackingSettings(), there) == (5, "crashed")


def test_one_sync_of_a_sweep_at_a_time(tmp_path: Path) -> None:
    with (
        sync._exclusively(tmp_path),
        pytest.raises(NotWell, match="another sync"),
        sync._exclusively(tmp_path),
    ):
        pass
    with sync._exclusively(tmp_path):
        pass


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("simple", Wanted("simple")),
        ("simple.r.00003", Wanted("simple", "simple.r.00003")),
        ("simple.r.00003.1a2b3c4d", Wanted("simple", "simple.r.00003", "simple.r.00003.1a2b3c4d")),
        ("p/simple.r.00003.1a2b3c4d-2", Wanted("simple", "simple.r.00003", "simple.r.00003.1a2b3c4d-2", "p")),
        ("me/p/simple", Wanted("simple", None, None, "p", "me")),
    ],
)
def test_what_is_named(name: str, wanted: Wanted) -> None:
    assert Wanted.parse(name) == wanted


@pytest.mark.parametrize(
    "name", ["", "/simple", "a/b/c/simple", "../simple", "Simple", "simple.r.3", "simple\n"]
)
def test_what_names_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="names no run"):
        Wanted.parse(name)
