"""What a copy has to have before its instance goes, and what is taken for a copy at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arriving
import pytest
import yaml

from sweeper.errors import ConfigError
from sweeper.launch.vast import launch
from sweeper.launch.vast.copies import lacking
from sweeper.launch.vast.plan import Plan

GROUP = yaml.safe_load((Path(__file__).parents[2] / "conf/launcher/vast.yaml").read_text())


def damage(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / f"checkpoints/step_{step:08d}/model.pth").write_bytes(b"torn")


def test_a_copy_needs_results_and_the_newest_checkpoint(tmp_path: Path) -> None:
    done, behind, level = (
        arriving.make_run(tmp_path, number=number, steps=(20, 40), result={} if number == 0 else None)
        for number in range(3)
    )
    copy: dict[str, tuple[bool, int | None]] = {
        done.name: (False, 40),
        behind.name: (False, 20),
        level.name: (False, 40),
    }
    assert lacking([done, behind, level], copy.__getitem__) == [
        "simple.r.00000: its result",
        "simple.r.00001: step 40 (it has 20)",
    ]
    copy[done.name] = (True, None)
    assert lacking([done, behind], copy.__getitem__) == [
        "simple.r.00000: step 40 (it has none)",
        "simple.r.00001: step 40 (it has 20)",
    ]
    assert lacking([done, behind], copy.__getitem__, has_newest=False) == []


@pytest.mark.parametrize("state", ["superseded", "failed", "cancelled"])
def test_a_copy_needs_no_checkpoint_of_what_nobody_goes_on_with(tmp_path: Path, state: str) -> None:
    run_dir = arriving.make_run(tmp_path, steps=(15,), result={"state": state, "value": None})
    assert lacking([run_dir], lambda _: (True, None)) == []
    assert lacking([run_dir], lambda _: (False, None)) == ["simple.r.00000: its result"]


def test_a_copy_needs_no_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    run_dir = arriving.make_run(tmp_path, steps=(20, 40, 60))
    damage(run_dir, 60)
    assert lacking([run_dir], lambda _: (False, 40)) == []
    assert lacking([run_dir], lambda _: (False, 20)) == ["simple.r.00000: step 40 (it has 20)"]
    damage(run_dir, 20, 40)
    assert lacking([run_dir], lambda _: (False, None)) == []


@pytest.mark.parametrize("result", ["{}", '{"state": "running", "lease_epoch": 1}', "torn"])
def test_a_copy_needs_no_result_that_does_not_count(tmp_path: Path, result: str) -> None:
    run_dir = arriving.make_run(tmp_path, steps=(20,))
    (run_dir / "result.json").write_text(result)
    assert lacking([run_dir], lambda _: (False, 20)) == []


def copies(
    mirror: str | None = None,
    uploads: str = "never",
    mode: str | None = None,
    here: dict[str, str] | None = None,
    **plan: Any,
) -> tuple[bool, bool]:
    config = {
        "mirror": {"url": mirror},
        "tracking": {"wandb": {"upload_checkpoints": uploads, "mode": mode}},
    }
    return launch._copies(config, Plan.of({**GROUP, **plan}), here or {})


KEY = ["WANDB_API_KEY"]
WITH_MODE = [*KEY, "WANDB_MODE"]
DIRECTORY = "is a directory, which an instance takes with it"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(), "needs a place where the sweep survives"),
        (dict(mirror="/tmp/x"), DIRECTORY),
        (dict(mirror="x"), DIRECTORY),
        (dict(mirror="file:///tmp/x"), DIRECTORY),
        (dict(mirror="FILE:///tmp/x"), DIRECTORY),
        (dict(mirror="local:///tmp/x"), DIRECTORY),
        (dict(mirror="/tmp/x", uploads="last", env=KEY), DIRECTORY),
        (dict(uploads="last", mode="disabled", env=KEY), "its mode is disabled there. Set tracking.wandb.mode"),
        (dict(uploads="last", mode="offline", env=KEY), "its mode is offline there"),
        (dict(uploads="last", mode="online"), "WANDB_API_KEY is not in launcher.env"),
        (dict(uploads="last", here={"WANDB_API_KEY": "k"}), r"Set launcher.env=\[WANDB_API_KEY\]"),
        (dict(uploads="last", env=WITH_MODE, here={"WANDB_MODE": "offline"}), "its mode is offline there"),
    ],
)  # fmt: skip
def test_what_would_go_with_the_instance_is_no_copy(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        copies(**given)
    assert copies(**given, save=["exit 0"])[1] is (words == DIRECTORY and "uploads" in given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (dict(mirror="s3://bucket/x"), (True, False)),
        (dict(mirror="s3://bucket/x", uploads="last", mode="offline"), (True, False)),
        (dict(uploads="last", env=KEY), (False, True)),
        (dict(uploads="best", mode="online", env=KEY), (False, True)),
        (dict(uploads="last", env=KEY, here={"WANDB_MODE": "offline"}), (False, True)),
        (dict(uploads="last", mode="online", env=WITH_MODE, here={"WANDB_MODE": "offline"}), (False, True)),
    ],
)
def test_what_survives_the_instance_is_a_copy(given: dict[str, Any], found: tuple[bool, bool]) -> None:
    assert copies(**given) == found
