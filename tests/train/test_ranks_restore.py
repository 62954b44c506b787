"""What one rank cannot restore, no rank does, and all draw the same conclusion; nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import torch
from crash import mini
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from sweeper.errors import ConfigError
from sweeper.torch import Run, resumable
from sweeper.trainer.run import NoValidCheckpoint

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    mini.warm_up()


@pytest.fixture
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path


class Stubborn:
    """A part that raises when it is restored, as often as it is told."""

    def __init__(self, error: Exception | None, times: int) -> None:
        self.error, self.left = error, times

    def state_dict(self) -> dict[str, Any]:
        return {"one": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.error is not None and self.left:
            self.left -= 1
            raise self.error


def go(
    directory: Path, *, error: Exception | None = None, on: int = 1, times: int = 99
) -> forked_ranks.Ended:
    """Train on two ranks; a part of rank `on` raises when it is restored."""

    def act(run: Run, rank: int) -> int:
        model = DistributedDataParallel(nn.Linear(2, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        part = Stubborn(error if rank == on else None, times)
        loader = DataLoader(TensorDataset(torch.ones(12, 2)), batch_size=2, shuffle=True)
        loop = resumable(run, model=model, optimizer=optimizer, part=part, loader=loader)
        start = loop.step
        for (inputs,) in loop.batches(epochs=2):
            model(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        run.finish()
        return start

    return forked_ranks.attempt(directory, 2, act, checkpoint={"every_n_steps": 2, "keep_last": 3})


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("error", [AttributeError("x"), ValueError("x"), MemoryError("x")], ids=type)
def test_one_refusal_moves_all_to_the_next(base: Path, error: Exception, on: int) -> None:
    assert go(base / "x.r.00000").results == [0, 0]
    assert go(base / "x.r.00000", error=error, on=on, times=1).results == [4, 4]


@pytest.mark.parametrize("on", [0, 1])
def test_all_say_the_same_when_nothing_fits(base: Path, on: int) -> None:
    go(base / "x.r.00000")
    started = time.monotonic()
    ended = go(base / "x.r.00000", error=AttributeError("no such thing"), on=on)
    assert time.monotonic() - started < 10, "nobody waited for the others"
    assert [type(result) for result in ended.results] == [ConfigError, ConfigError]
    where = "" if on == 0 else "rank 1: "
    for result in ended.results:
        assert f"step 6: {where}it does not fit this training: AttributeError: no such thing" in str(result)


def test_all_say_so_when_one_has_too_little_memory(base: Path) -> None:
    go(base / "x.r.00000")
    ended = go(base / "x.r.00000", error=MemoryError())
    assert [type(result) for result in ended.results] == [MemoryError, MemoryError]


def test_all_say_so_when_nothing_is_valid(base: Path) -> None:
    go(base / "x.r.00000")
    for step in (base / "x.r.00000" / "checkpoints").glob("step_*"):
        mini.damage(step)
    ended = go(base / "x.r.00000")
    assert [type(result) for result in ended.results] == [NoValidCheckpoint, NoValidCheckpoint]
