"""Everything that makes a step at once, killed and stopped in any batch: the same bytes in the end.

Dropout, batch norm, shuffling, augmentation, AdamW, warm-up, autocast with a GradScaler that grows and
skips a step, an average of weights, three batches an update, with and without loader processes.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import beside, mini
from crash.mini import Final, Place, final, finish, forked, was_killed
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from sweeper import checkpoints, processes
from sweeper.torch import Run, resumable

EPOCHS, BATCHES, ACCUMULATE = 3, 10, 3  # the fourth update of an epoch has one batch
LAST_STEP = EPOCHS * 4
KILL_POINTS = [1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 16, 19, 20, 21, 23, 26, 29, 30]
killed_in_batch = stopped_in_batch = 0


class Augmented(Dataset):
    """Samples that the generators of Python, NumPy and torch change anew each time."""

    def __len__(self) -> int:
        return 2 * BATCHES - 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / 20, index % 3])
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return x + noise / 10, x.sum().reshape(1)


def train(cfg: Any, run: Run) -> float:
    loader = DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=cfg.num_workers)
    model = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))
    outer = wrapped(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    scheduler = SequentialLR(optimizer, [warm_up, ConstantLR(optimizer, 0.5, 3)], milestones=[4])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    loop = resumable(
        run, model=outer, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema, loader=loader
    )
    for inputs, targets in loop.batches(epochs=EPOCHS, accumulate=ACCUMULATE):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ((outer(inputs) - targets) ** 2).mean() / ACCUMULATE
        jitter = random.gauss(0, 1) + float(np.random.randn()) + torch.randn(()).item()
        is_bad = loop.step == 5 and loop.is_update
        scaler.scale(loss * (float("inf") if is_bad else 1 + jitter / 50)).backward()
        if loop.is_update:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            ema.update_parameters(model)
        disturb(run, batch=loop.epoch * BATCHES + loop.step_in_epoch)
        loop.report(
            **{f"loss_{loop.step_in_epoch % ACCUMULATE}": loss, "jitter": jitter, "scale": scaler.get_scale()}
        )
    model.eval()
    x = torch.arange(12.0).reshape(6, 2) / 6
    value = ((model(x) + ema(x) - 2 * x.sum(1, keepdim=True)) ** 2).mean().item()
    loop.report(loss=value)
    return value


def wrapped(model: nn.Module) -> nn.Module:
    """The model as it is trained; test_ranks_matrix puts another one here."""
    return model


def disturb(run: Run, *, batch: int) -> None:
    global stopped_in_batch
    if batch == killed_in_batch:
        os.kill(os.getpid(), signal.SIGKILL)
    if batch == stopped_in_batch:
        stopped_in_batch = 0  # the next attempt may be in this process
        run._link.stop_reason = "asked to"  # type: ignore[misc]


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        mini.warm_up()
        yield path


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0, id="no-loader-processes"),
        pytest.param(2, id="two-loader-processes", marks=pytest.mark.slow),
    ],
)
def sweep(base: Path, request: pytest.FixtureRequest) -> tuple[Place, Final]:
    """A fresh sweep, and the end of an undisturbed training of it."""
    place = mini.new_place(
        base / f"fresh-{request.param}",
        trainer={"_target_": f"{__name__}.train", "num_workers": request.param},
        checkpoint={"every_n_steps": 2},
    )
    done = place.copy(base / f"done-{request.param}")
    assert finish(done) == 0, done.printed()
    end = final(done)
    assert end.problems == []
    assert end.step == LAST_STEP
    assert end.metrics.count(b"\n") == LAST_STEP + 1
    return place, end


@pytest.fixture
def where(base: Path, request: pytest.FixtureRequest) -> Path:
    return base / request.node.name


def disturbed(
    place: Place, *, killed: int = 0, stopped: int = 0, is_beside: bool = False
) -> Callable[[], int]:
    """A worker whose trainer is killed or asked to stop in the middle of a batch."""

    def run() -> int:
        global killed_in_batch, stopped_in_batch
        killed_in_batch, stopped_in_batch = killed, stopped
        me = os.getpid()
        os.register_at_fork(after_in_child=lambda: processes.die_with_parent(me))  # as a trainer does
        return (beside if is_beside else mini).work(place)()

    return run


def check_killed(sweep: tuple[Place, Final], where: Path, batch: int, *, is_beside: bool = False) -> None:
    place = sweep[0].copy(where)
    status = forked(disturbed(place, killed=batch, is_beside=is_beside), log=place.log)
    assert was_killed(status), place.printed()
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


def check_stopped(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    place = sweep[0].copy(where)
    forked(disturbed(place, stopped=batch), log=place.log)
    assert finish(place) == 0, place.printed()
    outcomes = [row["outcome"] for row in place.rows("SELECT outcome FROM sweeper_attempt ORDER BY attempt")]
    assert outcomes == ["preempted", "completed"], place.printed()
    assert sweep[1].differs(final(place)) is None


@pytest.mark.parametrize("batch", [8, 19])
def test_killed(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    check_killed(sweep, where, batch)


@pytest.mark.parametrize("batch", [14, 10])
def test_stopped_in_an_accumulation(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    """In the middle of one the gradients so far are saved, too; the tenth batch is the last of an epoch."""
    check_stopped(sweep, where, batch)


def test_gradients_are_saved_only_where_there_are_some(
    sweep: tuple[Place, Final], base: Path, where: Path
) -> None:
    place = sweep[0].copy(where)

    def look(operation: str, path: Path) -> None:
        if operation == "create" and path.name == "gradients.pt":
            print("GRADIENTS", flush=True)

    def run() -> int:
        mini.fsops.probe = look
        return disturbed(place, stopped=14)()

    forked(run, log=place.log)
    assert place.printed().count("GRADIENTS") == 1
    for _, directory in checkpoints.steps_on_disk(place.root()):
        has_gradients = (directory / "gradients.pt").exists()
        assert has_gradients == ("accumulated" in (directory / "state.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("batch", KILL_POINTS)
def test_killed_in_any_batch(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    check_killed(sweep, where, batch)


@pytest.mark.slow
@pytest.mark.parametrize("batch", KILL_POINTS[::2])
def test_killed_in_any_batch_with_a_saver(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    check_killed(sweep, where, batch, is_beside=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", KILL_POINTS[:-1])
def test_stopped_in_any_batch(sweep: tuple[Place, Final], where: Path, batch: int) -> None:
    check_stopped(sweep, where, batch)


@pytest.mark.slow
def test_stopped_after_every_single_batch(sweep: tuple[Place, Final], where: Path) -> None:
    place = sweep[0].copy(where)
    for batch in range(1, EPOCHS * BATCHES):
        status = forked(stopped_and_left(place, batch), log=place.log)
        assert was_killed(status), place.printed()
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


def stopped_and_left(place: Place, batch: int) -> Callable[[], int]:
    """Stopped with a checkpoint after one batch, and killed in the next: no step is trained twice."""

    def run() -> int:
        global killed_in_batch
        work = disturbed(place, stopped=batch)
        killed_in_batch = 0

        def look(operation: str, path: Path) -> None:
            global killed_in_batch
            if stopped_in_batch == 0:
                killed_in_batch = batch + 1

        mini.fsops.probe = look
        return work()

    return run
