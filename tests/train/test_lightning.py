"""A training by Lightning that is killed and resumed ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import mini
from crash.mini import Final, Place, final, finish, forked, was_killed
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sweeper.errors import ConfigError
from sweeper.torch import Run, open_run

pytest.importorskip("lightning.pytorch")
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from torchmetrics import MeanMetric

from sweeper.torch.lightning import Resumable

pytestmark = pytest.mark.slow

EPOCHS = 4
BATCHES = 7  # the last of an epoch is not full
UPDATES = 4  # an epoch, of two batches each, but for the last
SAVE_EVERY = 3
AFTER = (-1, 0)
"""After the last checkpoint, before anybody has heard of the value."""
Moment = tuple[int, int]
signals: dict[Moment, signal.Signals] = {}
"""(epoch, batch) at which the training gets a signal."""


def strike(epoch: int, batch: int) -> None:
    if number := signals.pop((epoch, batch), None):
        os.kill(os.getpid(), number)


class Noisy(Dataset):
    def __len__(self) -> int:
        return 4 * BATCHES - 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / 28, 1 - index / 28])
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return x + noise / 10, x[:1] * 3


class Module(LightningModule):
    """Dropout, batch norm, generators, two kinds of schedules, means over an epoch, a metric of torchmetrics."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        jitter = random.gauss(0, 1) + float(np.random.randn())
        loss = ((self.net(inputs) - targets + jitter / 20) ** 2).mean()
        self.seen.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        strike(self.current_epoch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", ((self.net(batch[0]) - batch[1]) ** 2).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        steps = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams["lr"], total_steps=EPOCHS * BATCHES + 1
        )
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
        return [optimizer], [
            {"scheduler": steps, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "loss"},
        ]


class TwoOptimizers(Module):
    """Manual optimization: a discriminator-like pair of optimizers, stepped by hand."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), (self.net, self.other), strict=True):
            loss = ((self.other(self.net(batch[0])) - batch[1]) ** 2).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.log(f"loss_of_{type(part).__name__}", loss)
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net.parameters(), lr=self.hparams["lr"])
        second = torch.optim.SGD(self.other.parameters(), lr=0.01, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 5, 0.5)]


class Data(LightningDataModule):
    """A data module with a state of its own."""

    num_asked = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.num_asked += 1
        return DataLoader(Noisy(), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(), batch_size=8)

    def state_dict(self) -> dict[str, Any]:
        return {"marks": [1, 2]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"marks": [1, 2]}


def fit(
    run: Run,
    *,
    patience: int = 9,
    min_delta: float = 0.0,
    is_manual: bool = False,
    is_averaged: bool = False,
    **changes: Any,
) -> Trainer:
    warnings.simplefilter("ignore")
    callbacks = [EarlyStopping("loss", min_delta=min_delta, patience=patience), Resumable(run)]
    usual = {
        "max_epochs": EPOCHS, "accumulate_grad_batches": 1 if is_manual else 2, "log_every_n_steps": 1, "logger": False,
        "val_check_interval": 3, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    if is_averaged:
        callbacks.append(EMAWeightAveraging(decay=0.8))
    trainer = Trainer(
        accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **{**usual, **changes}
    )
    module = TwoOptimizers(lr=0.05) if is_manual else Module(lr=0.05)
    trainer.fit(module, datamodule=Data())
    strike(*AFTER)
    return trainer


def train(cfg: Any, run: Run) -> float:
    return float(fit(run, **cfg.get("changes", {})).callback_metrics["loss"])


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        mini.warm_up()
        yield path


def fresh(base: Path, name: str, **changes: Any) -> Place:
    return mini.new_place(
        base / name,
        trainer={"_target_": f"{__name__}.train", "changes": changes},
        checkpoint={"every_n_steps": SAVE_EVERY},
    )


def undisturbed(place: Place, where: Path) -> Final:
    done = place.copy(where)
    assert finish(done) == 0, done.printed()
    end = final(done)
    assert end.problems == []
    return end


@pytest.fixture(scope="module")
def sweep(base: Path) -> tuple[Place, Final]:
    """A fresh sweep, and the end of an undisturbed training of it."""
    place = fresh(base, "fresh")
    return place, undisturbed(place, base / "done")


@pytest.fixture
def where(base: Path, request: pytest.FixtureRequest) -> Path:
    return base / request.node.name


def struck(place: Place, moment: Moment) -> Callable[[], int]:
    """A worker whose trainer is killed at a moment."""

    def run() -> int:
        signals[moment] = signal.SIGKILL
        return mini.work(place)()

    return run


def test_undisturbed_trainings_agree(sweep: tuple[Place, Final], where: Path) -> None:
    place = sweep[0].copy(where)
    assert finish(place) == 0
    assert sweep[1].differs(final(place)) is None


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param((0, 0), id="before-any-checkpoint"),
        pytest.param((0, 6), id="right-after-a-checkpoint"),
        pytest.param((1, 3), id="mid-epoch"),
        pytest.param((1, 6), id="last-of-an-epoch"),
        pytest.param((2, 0), id="first-of-an-epoch"),
        pytest.param((3, 1), id="mid-accumulation"),
        pytest.param((EPOCHS - 1, BATCHES - 1), id="last-of-all"),
        pytest.param(AFTER, id="after-all"),
    ],
)
def test_killed_once(sweep: tuple[Place, Final], where: Path, moment: Moment) -> None:
    place = sweep[0].copy(where)
    assert was_killed(forked(struck(place, moment), log=place.log)), place.printed()
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


def test_killed_again_and_again(sweep: tuple[Place, Final], where: Path) -> None:
    place = sweep[0].copy(where)
    for moment in ((0, 5), (1, 1), (1, 6), (2, 2), (3, 4), AFTER):
        assert was_killed(forked(struck(place, moment), log=place.log)), place.printed()
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


@pytest.mark.parametrize(
    ("changes", "num_updates"),
    [
        pytest.param({"max_steps": 10}, 10, id="a-number-of-steps-in-mid-epoch"),
        pytest.param({"max_steps": 10, "max_epochs": -1}, 10, id="a-number-of-steps-alone"),
        pytest.param({"patience": 2, "min_delta": 9.0}, None, id="stopped-early"),
        pytest.param({"check_val_every_n_epoch": None, "val_check_interval": 5}, 16, id="validation-across-epochs"),
        pytest.param({"accumulate_grad_batches": 1, "gradient_clip_val": 0.1}, 28, id="no-accumulation"),
        pytest.param({"precision": "bf16-mixed", "val_check_interval": 1.0}, 16, id="bfloat16"),
        pytest.param({"is_manual": True}, 28, id="manual-optimization"),
        pytest.param({"is_averaged": True}, 16, id="averaged-weights"),
    ],
)  # fmt: skip
def test_ways_to_train(base: Path, where: Path, changes: dict[str, Any], num_updates: int | None) -> None:
    place = fresh(base, f"{where.name}-fresh", **changes)
    end = undisturbed(place, base / f"{where.name}-done")
    assert end.step == num_updates or (num_updates is None and end.step < EPOCHS * UPDATES)
    place = place.copy(where)
    for moment in ((0, 5), (1, 2), AFTER):
        assert was_killed(forked(struck(place, moment), log=place.log)), place.printed()
    assert finish(place) == 0, place.printed()
    assert end.differs(final(place)) is None


def test_pruned_at_an_epochs_end(base: Path, where: Path) -> None:
    place = mini.new_place(
        where,
        trainer={"_target_": f"{__name__}.train"},
        pruner={"_target_": "optuna.pruners.ThresholdPruner", "upper": 1e-9},
    )
    assert finish(place) == 0, place.printed()
    end = final(place)
    assert (end.state, end.step) == ("pruned", 2)  # validated first after three batches
    assert end.problems == []


# --- without a sweep -------------------------------------------------------------------------


def alone(directory: Path, **changes: Any) -> int:
    """One attempt in a process of its own; returns its exit code."""

    def run() -> int:
        try:
            with open_run(directory, every_n_steps=SAVE_EVERY, every_s=None) as run:
                fit(run, **changes)
        except SystemExit as error:
            return int(str(error.code))
        return 0

    return os.waitstatus_to_exitcode(forked(run, log=directory.with_suffix(".log")))


def contents(directory: Path) -> dict[str, bytes]:
    newest = max((directory / "checkpoints").glob("step_*"))
    names = ("model.pth", "optimizer.pt", "rng_state.pt")
    return {
        "metrics": (directory / "metrics.jsonl").read_bytes(),
        **{name: (newest / name).read_bytes() for name in names},
    }


@pytest.mark.parametrize("moment", [(1, 1), (1, 2), (1, 6)], ids=["update", "mid-accumulation", "epoch-end"])
def test_a_signal_stops_with_a_checkpoint(
    base: Path, where: Path, monkeypatch: pytest.MonkeyPatch, moment: Moment
) -> None:
    undisturbed_dir = where.with_suffix(".done")
    assert alone(undisturbed_dir) == 0
    with monkeypatch.context() as patch:
        patch.setitem(signals, moment, signal.SIGTERM)
        assert alone(where) == 75
    assert (json.loads(max((where / "checkpoints").glob("step_*/state.json")).read_text())["epoch"]) == 1 + (
        moment == (1, 6)
    )
    assert alone(where) == 0
    assert contents(where) == contents(undisturbed_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"limit_train_batches": 3},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_epochs": -1},
    ],
    ids=str,
)
def test_what_could_not_be_resumed_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with open_run(tmp_path / "run") as run, pytest.raises(ConfigError, match="the Lightning trainer"):
        fit(run, **changes)
