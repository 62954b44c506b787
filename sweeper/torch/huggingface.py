"""Exact, verified, preemption-safe checkpoints for the Trainer of transformers.

trainer = ResumableTrainer(model, args, train_dataset=data, run=run)     # in place of Trainer
trainer.train()

`run` is what a sweep's training got, or `open_run(...)`. Any other subclass of Trainer becomes
resumable with `class Mine(Resumable, Seq2SeqTrainer)`. The Trainer by itself replays the data of an
epoch to find its position; here it is told, and gets its batches from there.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from sweeper.errors import ConfigError
from sweeper.torch.driven import DrivenLoop, canonical
from sweeper.trainer.run import Run

_MEASURED = ("_runtime", "_per_second", "_time")
"""What the clock says is no result: it would differ in every attempt."""


class Resumable:
    """Makes `train` of a Trainer resumable, and restores it if this run was interrupted.

    Restored are weights, optimizer, schedule, scaler, the Trainer's state and that of its callbacks,
    the generators of Python, NumPy and torch, and the data order. What the Trainer logs goes to the
    metrics log, less what it measured with a clock; the sweep's metric (e.g. `eval_loss`) reaches
    the pruner. A stop asked for is a checkpoint before the next update.

    Attributes:
        loop: The loop behind it, once `train` has begun.

    Args:
        run: What the training function got, or `open_run`'s.
    """

    loop: DrivenLoop | None = None
    _kept: _State
    _source: DataLoader[Any] | None = None

    def __init__(self, *args: Any, run: Run, **kwargs: Any) -> None:
        self._sweeper_run = run
        super().__init__(*args, **kwargs)
        self.add_callback(_Rows(self))  # type: ignore[attr-defined]

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from where this run was interrupted to the end.

        Raises:
            ConfigError: The Trainer does what could not be resumed exactly.
            Preempted, TrialPruned: As from `Loop.batches`.
        """
        _check(self, told=bool(resume_from_checkpoint or trial))
        trainer: Any = self
        trainer.create_optimizer()
        kept = self._kept = _State(trainer)
        loader = _plain(super().get_train_dataloader())  # type: ignore[misc]
        loop = self.loop = DrivenLoop.restored(
            self._sweeper_run, model=trainer.model, loader=loader, parts={"huggingface": kept}
        )
        loop.drive(**_limits(trainer.args, loop.num_batches), only_updates=True)
        if kept.output is None:
            self._source = _source(loop, loader)
            trainer.args.eval_on_start &= not loop.was_restored
            with tempfile.TemporaryDirectory() as directory:
                kept.write(Path(directory))
                start = directory if loop.was_restored else None
                kept.output = super().train(start, ignore_keys_for_eval=ignore_keys_for_eval)  # type: ignore[misc]
            self._source = None
        loop.finish()
        return kept.output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """While training, where the next batch comes from."""
        return super().get_train_dataloader() if self._source is None else self._source  # type: ignore[misc]

    # The Trainer reads these from a directory; what is here was verified and is there already.

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._kept.put_schedule()


class ResumableTrainer(Resumable, Trainer):
    """A Trainer with `run=…`."""


def _check(trainer: Any, *, told: bool) -> None:
    args: TrainingArguments = trainer.args
    problem = (
        "is given a checkpoint or a trial to train" if told
        else "trains in several processes" if args.world_size > 1
        else "has a model_init" if trainer.model_init is not None
        else "sets auto_find_batch_size" if args.auto_find_batch_size
        else "sets ignore_data_skip" if args.ignore_data_skip
        else "shards its model" if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        else None
    )  # fmt: skip
    if problem:
        raise ConfigError(f"the Trainer {problem}", why="Resumable could not resume it exactly")


def _limits(args: TrainingArguments, num_batches: int) -> dict[str, int]:
    """Where the Trainer ends, in updates."""
    accumulate = args.gradient_accumulation_steps
    updates = -(-num_batches // accumulate)
    steps = args.max_steps if args.max_steps > 0 else -int(-(args.num_train_epochs * updates) // 1)
    return {"epochs": -(-steps // updates), "max_steps": steps, "accumulate": accumulate}


# --- data ----------------------------------------------------------------------------------


def _plain(loader: Any) -> DataLoader[Any]:
    """The Trainer's loader without what accelerate made of it, which fetches one batch too many."""
    if loader.batch_sampler is None:
        raise ConfigError("the training data has no length", do="Give it a __len__, or use resumable().")
    return DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _source(loop: DrivenLoop, loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of batch numbers, so that the Trainer skips numbers where it would skip data."""
    return DataLoader(
        _Batches(loop, num_samples=len(loader.dataset)),  # type: ignore[arg-type]
        batch_sampler=BatchSampler(SequentialSampler(range(loop.num_batches)), batch_size=1, drop_last=False),
        collate_fn=_only,
        generator=torch.Generator(),  # making an iterator draws from it
    )


class _Batches(Dataset[Any]):
    def __init__(self, loop: DrivenLoop, *, num_samples: int) -> None:
        self._loop, self._num_samples = loop, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Any:
        return self._loop.next_batch(index=index)


def _only(batches: list[Any]) -> Any:
    return batches[0]


# --- metrics -------------------------------------------------------------------------------


class _Rows(TrainerCallback):
    """The Trainer's numbers become the row of their step."""

    def __init__(self, trainer: Resumable) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._kept.put_sums()

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self._trainer.loop is not None:
            self._trainer.loop.report(**{k: v for k, v in _results(logs or {}).items() if k != "epoch"})


def _results(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, int | float) and not name.endswith(_MEASURED)
    }


# --- state ---------------------------------------------------------------------------------


class _State:
    """Everything of a Trainer but the weights, as plain values.

    Attributes:
        output: What `train` returned, once it is over.
    """

    output: TrainOutput | None = None

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Taken between two updates."""
        trainer, output, scaler = self._trainer, self.output, self._trainer.accelerator.scaler
        state = {**dataclasses.asdict(trainer.state), "stateful_callbacks": {}}
        state["log_history"] = [_results(row) for row in state["log_history"]]
        kept = {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "trainer_state": json.dumps(state),
            "callbacks": json.dumps([callback.state() for callback in self._callbacks()]),
            "sums": {
                "loss": trainer._tr_loss.clone(),
                "logged_loss": trainer._total_loss_scalar,
                "logged_at": trainer._globalstep_last_logged,
                "flos": trainer.current_flos,
            },
            "output": None if output is None else [output.training_loss, _results(output.metrics)],
        }
        return canonical(kept)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what is there already; the rest waits for the Trainer to make it."""
        trainer, scaler = self._trainer, self._trainer.accelerator.scaler
        if (state["scaler"] is None) != (scaler is None):
            raise ValueError("it was made with another precision")
        trainer.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        self._loaded = state
        if state["output"] is not None:
            trainer.state = TrainerState(**json.loads(state["trainer_state"]))
            trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
            self.put_schedule()
            loss, metrics = state["output"]
            self.output = TrainOutput(trainer.state.global_step, loss, metrics)

    def write(self, directory: Path) -> None:
        """Write what the Trainer wants to read from a directory: where it stands."""
        if self._loaded is not None:
            (directory / TRAINER_STATE_NAME).write_text(self._loaded["trainer_state"])

    def put_schedule(self) -> None:
        """Once there is a schedule; making it has changed the optimizer's rates."""
        assert self._loaded is not None
        self._trainer.lr_scheduler.load_state_dict(self._loaded["scheduler"])
        self._trainer.optimizer.load_state_dict(self._loaded["optimizer"])

    def put_sums(self) -> None:
        """What the Trainer sets to zero at its start, and its callbacks' states."""
        if self._loaded is None:
            return
        trainer, sums = self._trainer, self._loaded["sums"]
        trainer._tr_loss = sums["loss"].to(trainer.args.device)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = sums["logged_loss"], sums["logged_at"]
        trainer._initial_global_step, trainer.current_flos = 0, sums["flos"]
        for callback, state in zip(self._callbacks(), json.loads(self._loaded["callbacks"]), strict=True):
            for name, value in state["attributes"].items():
                setattr(callback, name, value)

    def _callbacks(self) -> Iterator[Any]:
        return (
            callback
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, ExportableState) and not isinstance(callback, TrainerControl)
        )
