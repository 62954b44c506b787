"""FSDP2 and one rank take over from each other: one form of an optimizer's state in the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import torch
import torch.distributed as dist
from crash import mini
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints
from sweeper.errors import ConfigError
from sweeper.torch import Preempted, Run, resumable, sharded

pytestmark = pytest.mark.slow

WORLD = {"fsdp": 2, "plain": 1}


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    mini.warm_up()


@pytest.fixture
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path


def go(directory: Path, kind: str, *, until: int, groups: int = 2) -> tuple[int, int]:
    """Train to a step and stop; returns the step it began at, and how often the optimizer had stepped then."""

    def act(run: Run, rank: int) -> tuple[int, int]:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
        if kind == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        unused, *parameters = model.parameters()
        split = [[*parameters, unused]] if groups == 1 else [[*parameters[2:], unused], parameters[:2]]
        optimizer = torch.optim.AdamW([{"params": each, "lr": 0.01} for each in split])
        loader = DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=2, shuffle=True)
        loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
        start, taken = (
            loop.step,
            [int(optimizer.state[p]["step"]) for p in parameters if p in optimizer.state],
        )
        try:
            for (inputs,) in loop.batches(epochs=4):
                optimizer.zero_grad()
                model(inputs).square().sum().backward()
                optimizer.step()
                if loop.step == until and rank == 0:
                    run._link.stop_reason = "asked to"  # type: ignore[misc]
        except Preempted:
            assert len(set(taken)) <= 1
            assert unused not in optimizer.state
            return start, taken[0] if taken else 0
        raise AssertionError("it was to be stopped")

    ended = forked_ranks.attempt(directory, WORLD[kind], act)
    if isinstance(ended.results[0], BaseException):
        raise ended.results[0]
    return ended.results[0]  # type: ignore[no-any-return]


def newest(directory: Path) -> dict[str, Any]:
    (_, step), *_ = checkpoints.steps_on_disk(directory / "checkpoints")
    return torch.load(step / "optimizer.pt", weights_only=True)["optimizer"]  # type: ignore[no-any-return]


def test_sharded_plain_and_sharded_again(base: Path) -> None:
    directory = base / "x.r.00000"
    assert go(directory, "fsdp", until=3) == (0, 0)
    assert go(directory, "plain", until=5) == (3, 3)
    one = newest(directory)
    assert go(directory, "fsdp", until=7) == (5, 5)
    assert go(directory, "fsdp", until=9) == (7, 7)
    other = newest(directory)
    assert [group["params"] for group in one["param_groups"]] == [[0, 1, 2], [3, 4]]
    assert [group["params"] for group in other["param_groups"]] == [[0, 1, 2], [3, 4]]
    assert set(one["state"]) == set(other["state"]) == {0, 1, 3, 4}, "one never had a gradient"


@pytest.mark.parametrize("kind", ["fsdp", "plain"])
def test_names_of_an_earlier_version_are_read(base: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    directory = base / "x.r.00000"
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_renamed", lambda state, names: state)
        go(directory, "fsdp", until=3)
    assert "0.weight" in newest(directory)["state"]
    assert go(directory, kind, until=5) == (3, 3)


@pytest.mark.parametrize("kind", ["fsdp", "plain"])
def test_other_groups_are_named_before_anything_is_changed(base: Path, kind: str) -> None:
    go(base / "x.r.00000", "fsdp", until=3)
    with pytest.raises(ConfigError, match=r"has groups of \[3, 2\] parameters, this one of \[5\]"):
        go(base / "x.r.00000", kind, until=5, groups=1)
