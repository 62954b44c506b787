"""An interrupted training ends with the bytes of an undisturbed one, wherever it was interrupted."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import mini
from crash.mini import Final, Place, final, finish, forked, was_killed
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sweeper import checkpoints, manifests, processes, rundir
from sweeper.channel import Message
from sweeper.errors import ConfigError
from sweeper.torch import Run, resumable
from sweeper.trainer.run import NoValidCheckpoint, Spec

EPOCHS = 3
BATCHES = 5  # the last of an epoch is not full
SAVE_EVERY = 4
LAST_STEP = EPOCHS * BATCHES
killed_in_step = 0


class Augmented(Dataset):
    """Samples that the generators of Python, NumPy and torch change anew each time."""

    def __init__(self) -> None:
        self.x = torch.arange(36, dtype=torch.float32).reshape(18, 2) / 36

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.x[index] + noise / 10, self.x[index].sum().reshape(1)


def train(cfg: Any, run: Run) -> float:
    """Dropout, shuffling, augmentation, AdamW, a schedule, an average of weights, all generators."""
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=cfg.num_workers)
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    scheduler = OneCycleLR(optimizer, max_lr=cfg.lr, total_steps=LAST_STEP + 1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    loop = resumable(run, model=model, optimizer=optimizer, scheduler=scheduler, ema=ema, loader=loader)
    for inputs, targets in loop.batches(epochs=EPOCHS):
        model.train()
        jitter = random.gauss(0, 1) + float(np.random.randn()) + torch.randn(()).item()
        optimizer.zero_grad()
        loss = ((model(inputs) - targets + jitter / 20) ** 2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        if loop.step == killed_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        loop.report(train_loss=loss.item(), jitter=jitter, lr=scheduler.get_last_lr()[0])
    model.eval()
    x = Augmented().x
    value = ((model(x) + ema(x) - 2 * x.sum(1, keepdim=True)) ** 2).mean().item()
    loop.report(loss=value)
    return value


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
        checkpoint={"every_n_steps": SAVE_EVERY},
    )
    done = place.copy(base / f"done-{request.param}")
    assert finish(done) == 0, done.printed()
    end = final(done)
    assert end.problems == []
    assert end.metrics.count(b"\n") == LAST_STEP + 1
    return place, end


@pytest.fixture
def where(base: Path, request: pytest.FixtureRequest) -> Path:
    return base / request.node.name


def killed_in(place: Place, step: int) -> Callable[[], int]:
    """A worker whose trainer is killed in the middle of a step, before anything of it is logged."""

    def run() -> int:
        global killed_in_step
        killed_in_step = step
        me = os.getpid()
        os.register_at_fork(after_in_child=lambda: processes.die_with_parent(me))  # as a trainer does
        return mini.work(place)()

    return run


def test_undisturbed_trainings_agree(sweep: tuple[Place, Final], where: Path) -> None:
    place = sweep[0].copy(where)
    assert finish(place) == 0
    assert sweep[1].differs(final(place)) is None


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="before-any-checkpoint"),
        pytest.param(5, id="right-after-a-checkpoint"),
        pytest.param(7, id="mid-epoch"),
        pytest.param(10, id="last-of-an-epoch"),
        pytest.param(11, id="first-of-an-epoch"),
        pytest.param(LAST_STEP, id="last-of-all"),
    ],
)
def test_killed_once(sweep: tuple[Place, Final], where: Path, step: int) -> None:
    place = sweep[0].copy(where)
    assert was_killed(forked(killed_in(place, step), log=place.log))
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


def test_killed_again_and_again(sweep: tuple[Place, Final], where: Path) -> None:
    place = sweep[0].copy(where)
    for step in (3, 6, 9, 9, 14):
        assert was_killed(forked(killed_in(place, step), log=place.log))
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


# --- checkpoints that do not fit ---------------------------------------------------------------


class Alone:
    """A link with nobody behind it; remembers what it was told."""

    stop_reason = None

    def __init__(self) -> None:
        self.told: list[tuple[str, Message]] = []

    def poll(self) -> None:
        pass

    def tell(self, kind: str, **data: Any) -> None:
        self.told.append((kind, data))

    def ask(self, kind: str, **data: Any) -> Message:
        return {}

    @property
    def refusals(self) -> list[str]:
        return [data["reason"] for kind, data in self.told if kind == "refused"]


def new_run(directory: Path, *, lease_epoch: int = 1, **trainer: Any) -> Run:
    """A run in `directory`, whose configuration has these keys below `trainer`."""
    for name in (rundir.CHECKPOINTS_DIR, rundir.LOGS_DIR):
        (directory / name).mkdir(parents=True, exist_ok=True)
    cfg = OmegaConf.create({"trainer": trainer})
    spec = Spec(
        run_dir=str(directory), run_id=directory.name, sweep="fit", trial=0, params={}, seed=3, threads=1,
        attempt=lease_epoch, lease_epoch=lease_epoch, config_digest=manifests.digest(OmegaConf.to_yaml(cfg).encode()),
        deadline_s=float("inf"), metric="loss", direction="minimize", has_pruner=False, was_committed=False,
        checkpoint={"every_n_steps": 1, "every_s": None, "keep_last": 3},
    )  # fmt: skip
    return Run(spec, Alone(), config=cfg)


class Training:
    """Model, optimizer and data of one attempt; `run.config` may have a width."""

    def __init__(self, *, width: int = 3, num_samples: int = 8, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(width)
        self.model = nn.Linear(2, width, dtype=dtype)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.model.parameters())
        x = torch.ones(num_samples, 2, dtype=dtype)
        self.loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
        self.more: dict[str, Any] = {}

    def go(self, run: Run) -> None:
        loop = resumable(run, model=self.model, optimizer=self.optimizer, loader=self.loader, **self.more)
        for (inputs,) in loop.batches(epochs=1):
            self.optimizer.zero_grad()
            self.model(inputs).sum().backward()
            self.optimizer.step()

    def values(self) -> list[Any]:
        """Everything a restore could change."""
        state = [tensor.clone() for tensor in self.model.state_dict().values()]
        return [
            *map(torch.Tensor.tolist, state),
            str(self.optimizer.state_dict()),
            torch.get_rng_state().tolist(),
        ]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with checkpoints of a training with width 3."""
    directory = tmp_path / "fit.r.00000"
    Training(width=3).go(new_run(directory, width=3, lr=0.1))
    assert len(checkpoints.steps_on_disk(directory / rundir.CHECKPOINTS_DIR)) == 2
    return directory


def refused(training: Training, run: Run, error: type[Exception] = ConfigError) -> str:
    """Why the newest checkpoint is not used; nothing may have changed by then."""
    before = training.values()
    with pytest.raises(error):
        training.go(run)
    assert training.values() == before
    return str(run._link.refusals[0])  # type: ignore[attr-defined]


def test_what_fits_is_used(trained: Path) -> None:
    run = new_run(trained, lease_epoch=2, width=3, lr=0.1)
    training = Training(width=3)
    before = training.values()
    training.go(run)
    assert run._link.refusals == []  # type: ignore[attr-defined]
    assert training.values()[0] != before[0]


def test_another_width_is_named(trained: Path) -> None:
    reason = refused(Training(width=5), new_run(trained, lease_epoch=2, width=5, lr=0.1))
    assert "the checkpoint has width 3, the configuration has 5" in reason


def test_another_architecture_of_the_same_configuration_is_named(trained: Path) -> None:
    reason = refused(Training(width=5), new_run(trained, lease_epoch=2, width=3, lr=0.1))
    assert "parameter weight has shape (3, 2) in the checkpoint, (5, 2) in the model" in reason


def test_missing_and_extra_parameters_are_named(trained: Path) -> None:
    more = Training(width=3)
    more.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert "parameter scale" in refused(more, new_run(trained, lease_epoch=2, width=3, lr=0.1))
    fewer = Training(width=3)
    fewer.model.register_parameter("bias", None)
    assert "parameter bias" in refused(fewer, new_run(trained, lease_epoch=2, width=3, lr=0.1))


def test_another_precision_is_named(trained: Path) -> None:
    reason = refused(Training(width=3, dtype=torch.float64), new_run(trained, lease_epoch=2, width=3, lr=0.1))
    assert "float32 in the checkpoint, torch.float64 in the model" in reason


def test_another_set_of_parts_is_named(trained: Path) -> None:
    training = Training(width=3)
    training.more["scheduler"] = torch.optim.lr_scheduler.ConstantLR(training.optimizer)
    reason = refused(training, new_run(trained, lease_epoch=2, width=3, lr=0.1))
    assert "it holds ['optimizer'], this training has ['optimizer', 'scheduler']" in reason


def test_an_optimizer_with_other_groups_is_refused_before_the_model_changes(trained: Path) -> None:
    training = Training(width=3)
    weight, bias = training.model.parameters()
    training.optimizer = torch.optim.Adam([{"params": [weight]}, {"params": [bias]}])
    reason = refused(training, new_run(trained, lease_epoch=2, width=3, lr=0.1))
    assert "has groups of [2] parameters, this one of [1, 1]" in reason


def test_another_amount_of_data_is_named(trained: Path) -> None:
    reason = refused(Training(width=3, num_samples=20), new_run(trained, lease_epoch=2, width=3, lr=0.1))
    assert "it counts 2 batches an epoch, the loader has 5" in reason


def test_another_configuration_without_a_difference_that_a_trainer_sees(trained: Path) -> None:
    run = new_run(trained, lease_epoch=2, width=3, lr=0.1)
    run.spec = replace(run.spec, config_digest="other")
    assert "another config.yaml" in refused(Training(width=3), run, NoValidCheckpoint)
