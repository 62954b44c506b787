"""Everything that makes a step, on two ranks: one of them killed in any batch, and the same bytes in the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import test_resume_matrix as matrix
import torch
from crash import mini
from torch.nn.parallel import DistributedDataParallel

from sweeper import checkpoints, rundir
from sweeper.torch import Run

pytestmark = pytest.mark.slow

BATCHES = 3 * 5
"""Three epochs of 19 samples, two a batch and rank."""
KILL_POINTS = [(at % 2, at) for at in range(1, BATCHES + 1)] + [(1 - at % 2, at) for at in range(3, 13, 2)]
"""(rank, batch)."""
FILES = ("model.pth", "optimizer.pt", "rng_state.pt", "rng_state.rank1.pt", "state.json")


class Config:
    num_workers = 0


def train(run: Run, rank: int, *, killed: int, at: int) -> float:
    """What test_resume_matrix trains, wrapped in DDP; rank `killed` dies in batch `at`."""
    count = 0

    def disturb(run: Run, *, batch: int) -> None:
        nonlocal count
        count += 1
        if rank == killed and count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    matrix.disturb = disturb  # type: ignore[assignment]  # all this in a rank of its own only
    matrix.wrapped = DistributedDataParallel  # type: ignore[assignment]
    value = matrix.train(Config(), run)
    run.finish()
    return value


def attempt(directory: Path, *, killed: int = -1, at: int = 0) -> forked_ranks.Ended:
    def act(run: Run, rank: int) -> float:
        return train(run, rank, killed=killed, at=at)

    return forked_ranks.attempt(directory, 2, act, checkpoint={"every_n_steps": 2, "keep_last": 2})


def end_of(directory: Path) -> dict[str, bytes]:
    (_, newest), *_ = checkpoints.steps_on_disk(directory / "checkpoints")
    files = {name: (newest / name).read_bytes() for name in FILES}
    return {**files, "metrics": (directory / rundir.METRICS_FILE).read_bytes()}


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        mini.warm_up()
        yield path


@pytest.fixture(scope="module")
def whole(base: Path) -> tuple[dict[str, bytes], list[Any]]:
    ended = attempt(base / "whole.r.00000")
    assert ended.statuses == [0, 0]
    return end_of(base / "whole.r.00000"), ended.results


def check(base: Path, whole: tuple[dict[str, bytes], list[Any]], *, killed: int, at: int) -> None:
    directory = base / f"killed-{killed}-{at}.r.00000"
    ended = attempt(directory, killed=killed, at=at)
    assert os.WTERMSIG(ended.statuses[killed]) == signal.SIGKILL
    assert ended.statuses[1 - killed] != 0, "the other one does not go on alone"
    again = attempt(directory)
    assert again.statuses == [0, 0]
    assert again.results == whole[1]
    assert end_of(directory) == whole[0]


@pytest.mark.parametrize(("killed", "at"), KILL_POINTS)
def test_killed_in_any_batch(
    base: Path, whole: tuple[dict[str, bytes], list[Any]], killed: int, at: int
) -> None:
    check(base, whole, killed=killed, at=at)


def test_the_points_are_what_they_are_meant_to_be(whole: tuple[dict[str, bytes], list[Any]]) -> None:
    assert len(set(KILL_POINTS)) == 20
    assert whole[0]["metrics"].count(b"\n") == 3 * 2 + 1
    assert torch.isfinite(torch.tensor(whole[1])).all()
