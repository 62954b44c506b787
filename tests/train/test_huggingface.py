"""A training by the Trainer of transformers that is killed and resumed ends with the bytes of an undisturbed one."""

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
from crash import mini
from crash.mini import Final, Place, final, finish, forked, was_killed
from torch.utils.data import Dataset

from sweeper.errors import ConfigError
from sweeper.torch import Run, open_run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sweeper.torch.huggingface import Resumable, ResumableTrainer

pytestmark = pytest.mark.slow

EPOCHS = 3
BATCHES = 7  # the last of an epoch is not full
UPDATES = 4  # an epoch, of two batches each, but for the last
SAVE_EVERY = 3
AFTER = (-1, 0)
"""After the last checkpoint, before anybody has heard of the value."""
Moment = tuple[int, int]
signals: dict[Moment, signal.Signals] = {}
"""(updates so far, batch of the next one) at which the training gets a signal."""


def strike(update: int, batch: int) -> None:
    if number := signals.pop((update, batch), None):
        os.kill(os.getpid(), number)


class Noisy(Dataset):
    """Sentences in which some words are changed anew each time."""

    def __len__(self) -> int:
        return 4 * BATCHES - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        words = [(index * step) % 31 for step in range(8)]
        words[random.randrange(8)] = int(np.random.randint(31))
        words[int(torch.randint(8, ()))] = 31
        return {"input_ids": words, "labels": words}


class Struck(Trainer):
    batch = (-1, 0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step else 0)
        strike(*self.batch)
        return super().training_step(*args, **kwargs)


class Mine(Resumable, Struck):
    """Any subclass of Trainer can be made resumable."""


def tiny() -> GPT2LMHeadModel:
    """With dropout, as GPT-2 has it; the weights are random."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def arguments(run: Run, **changes: Any) -> TrainingArguments:
    usual = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 0.01, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss", "greater_is_better": False,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 5, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(run.directory / "hf"), **{**usual, **changes})


def fit(run: Run, *, patience: int = 99, threshold: float = 0.0, **changes: Any) -> Trainer:
    stop = EarlyStoppingCallback(patience, threshold)
    trainer = Mine(
        tiny(),
        arguments(run, **changes),
        train_dataset=Noisy(),
        eval_dataset=Noisy(),
        callbacks=[stop],
        run=run,
    )
    output = trainer.train()
    assert output.global_step == trainer.state.global_step
    strike(*AFTER)
    return trainer


def train(cfg: Any, run: Run) -> float:
    return float(fit(run, **cfg.get("changes", {})).evaluate()["eval_loss"])


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
        pytest.param((3, 0), id="right-after-a-checkpoint"),
        pytest.param((5, 1), id="mid-accumulation"),
        pytest.param((7, 0), id="last-of-an-epoch"),
        pytest.param((8, 0), id="first-of-an-epoch"),
        pytest.param((EPOCHS * UPDATES - 1, 0), id="last-of-all"),
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
    for moment in ((2, 1), (3, 0), (6, 0), (9, 1), (9, 1), (11, 0), AFTER):
        assert was_killed(forked(struck(place, moment), log=place.log)), place.printed()
    assert finish(place) == 0, place.printed()
    assert sweep[1].differs(final(place)) is None


@pytest.mark.parametrize(
    ("changes", "num_updates"),
    [
        pytest.param({"max_steps": 10}, 10, id="a-number-of-steps-in-mid-epoch"),
        pytest.param({"num_train_epochs": 2.4}, 10, id="a-part-of-an-epoch"),
        pytest.param({"patience": 1, "threshold": 9.0}, 6, id="stopped-early"),
        pytest.param({"gradient_accumulation_steps": 1, "max_grad_norm": 0.1, "logging_steps": 3}, 21, id="no-accumulation"),
        pytest.param({"bf16": True, "eval_strategy": "epoch", "dataloader_drop_last": True}, 9, id="bfloat16"),
        pytest.param({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_on_start": True}, 12, id="plateau"),
        pytest.param({"dataloader_num_workers": 2}, 12, id="loader-processes"),
        pytest.param({"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0}, 12, id="noise"),
    ],
)  # fmt: skip
def test_ways_to_train(base: Path, where: Path, changes: dict[str, Any], num_updates: int) -> None:
    place = fresh(base, f"{where.name}-fresh", **changes)
    end = undisturbed(place, base / f"{where.name}-done")
    assert end.step == num_updates
    place = place.copy(where)
    for moment in ((4, 0), (5, 0), AFTER):
        assert was_killed(forked(struck(place, moment), log=place.log)), place.printed()
    assert finish(place) == 0, place.printed()
    assert end.differs(final(place)) is None


def test_pruned(where: Path) -> None:
    place = mini.new_place(
        where,
        trainer={"_target_": f"{__name__}.train"},
        pruner={"_target_": "optuna.pruners.ThresholdPruner", "upper": 1e-9},
    )
    assert finish(place) == 0, place.printed()
    end = final(place)
    assert (end.state, end.step) == ("pruned", 2)  # the first step that is logged
    assert end.problems == []


# --- without a sweep -------------------------------------------------------------------------


def alone(directory: Path, **changes: Any) -> int:
    """One attempt in a process of its own; returns its exit code."""

    def run() -> int:
        try:
            with open_run(directory, metric="eval_loss", every_n_steps=SAVE_EVERY, every_s=None) as run:
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


@pytest.mark.parametrize("moment", [(4, 0), (5, 1), (7, 0)], ids=["update", "mid-accumulation", "epoch-end"])
def test_a_signal_stops_with_a_checkpoint(
    where: Path, monkeypatch: pytest.MonkeyPatch, moment: Moment
) -> None:
    undisturbed_dir = where.with_suffix(".done")
    assert alone(undisturbed_dir) == 0
    with monkeypatch.context() as patch:
        patch.setitem(signals, moment, signal.SIGTERM)
        assert alone(where) == 75
    newest = max((where / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{moment[0] + 1:08d}"
    assert alone(where) == 0
    assert contents(where) == contents(undisturbed_dir)


def test_a_plain_trainer_with_a_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        trainer = ResumableTrainer(tiny(), arguments(run, eval_strategy="no"), train_dataset=Noisy(), run=run)
        assert trainer.train().global_step == EPOCHS * UPDATES


@pytest.mark.parametrize("changes", [{"auto_find_batch_size": True}, {"ignore_data_skip": True}], ids=str)
def test_what_could_not_be_resumed_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with open_run(tmp_path / "run") as run, pytest.raises(ConfigError, match="the Trainer sets"):
        fit(run, **changes)


def test_a_checkpoint_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        trainer = ResumableTrainer(
            tiny(), arguments(run), train_dataset=Noisy(), eval_dataset=Noisy(), run=run
        )
        with pytest.raises(ConfigError, match="is given a checkpoint"):
            trainer.train(resume_from_checkpoint=True)
