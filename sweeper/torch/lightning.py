"""Exact, verified, preemption-safe checkpoints for Lightning: a callback.

keep = Resumable(run)                    # what a sweep's training got, or open_run(...)
trainer = Trainer(max_epochs=10, callbacks=[keep], enable_checkpointing=False)
trainer.fit(module, loader)

Lightning by itself goes on in mid-epoch with the first batches of another shuffle, and leaves the
random generators alone. Here its state is taken and put back where it waits for a batch.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch.utils.data import DataLoader
from torchmetrics import Metric

from sweeper.errors import ConfigError
from sweeper.torch.driven import DrivenLoop, canonical
from sweeper.trainer.run import Run

_NOT_KEPT = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "datamodule_")
    for name in ("hyper_parameters", "hparams_name", "hparams_type")
)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Resumable(Callback):
    """Makes `trainer.fit` resumable, and restores it if this run was interrupted.

    Restored are weights, optimizers, schedulers, precision plugin, callbacks, data module, loop
    progress, what `self.log` and torchmetrics have gathered of the epoch, the generators of Python,
    NumPy and torch, and the data order. What Lightning logs goes to the metrics log; the sweep's
    metric reaches the pruner. A stop asked for is a checkpoint before the next batch.

    Attributes:
        loop: The loop behind it, once `fit` has begun.

    Args:
        run: What the training function got, or `open_run`'s.

    Raises:
        ConfigError: The trainer does what could not be resumed exactly.
    """

    loop: DrivenLoop

    def __init__(self, run: Run) -> None:
        self._run = run
        self._signals: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Come before the other callbacks: they are restored before they are asked."""
        if stage != "fit":
            return
        _check(trainer)
        self._signals = {number: signal.getsignal(number) for number in _SIGNALS}
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]
        trainer.loggers = [*trainer.loggers, _Rows(self)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore everything, and put the ordered data in place of Lightning's."""
        fit_loop: Any = trainer.fit_loop
        state = _State(trainer)
        source = fit_loop._data_source
        loader = source.dataloader()
        if not isinstance(loader, DataLoader):
            raise ConfigError(f"training data must be one DataLoader, not {type(loader).__name__}")
        self.loop = DrivenLoop.restored(self._run, model=pl_module, loader=loader, parts={"lightning": state})
        state.keep_gradients()
        epochs = sys.maxsize if fit_loop.max_epochs in (None, -1) else fit_loop.max_epochs
        total = epochs * -(-self.loop.num_batches // trainer.accumulate_grad_batches)
        steps = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
        self.loop.drive(epochs=epochs, max_steps=steps, accumulate=trainer.accumulate_grad_batches)
        fit_loop._data_source = type(source)(_Batches(self.loop, state), source.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Who asked for signals before `fit` gets them: Lightning would end without a checkpoint."""
        with contextlib.suppress(ValueError):  # not the main thread
            for number, handler in self._signals.items():
                signal.signal(number, handler)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoint the last step, with what the other callbacks made of it."""
        self.loop.finish()


def _check(trainer: Any) -> None:
    problem = (
        "trains in several processes" if trainer.world_size > 1
        else "sets limit_train_batches" if trainer.limit_train_batches not in (None, 1.0)
        else "sets overfit_batches" if trainer.overfit_batches
        else "sets reload_dataloaders_every_n_epochs" if trainer.reload_dataloaders_every_n_epochs
        else "has neither max_epochs nor max_steps" if trainer.max_epochs == -1 and trainer.max_steps == -1
        else "has a GradientAccumulationScheduler"
        if any(
            isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
            for callback in trainer.callbacks
        )
        else None
    )  # fmt: skip
    if problem:
        raise ConfigError(f"the Lightning trainer {problem}", why="Resumable could not resume it exactly")


class _Batches:
    """What Lightning iterates over in place of the user's loader."""

    def __init__(self, loop: DrivenLoop, state: _State) -> None:
        self._loop, self._state = loop, state

    def __len__(self) -> int:
        return self._loop.num_batches

    def __iter__(self) -> Iterator[Any]:
        fit_loop: Any = self._state.trainer.fit_loop
        while True:
            self._state.put_progress()
            index = fit_loop.epoch_loop.batch_progress.current.ready
            yield self._loop.next_batch(epoch=fit_loop.epoch_progress.current.processed, index=index)


class _Rows(Logger):
    """Lightning's numbers become the row of their step."""

    def __init__(self, keep: Resumable) -> None:
        super().__init__()
        self._keep = keep

    @property
    def name(self) -> str:
        return "sweeper"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's configuration says them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Report what is not the epoch, which every row has."""
        self._keep.loop.report(**{name: value for name, value in metrics.items() if name != "epoch"})


class _State:
    """Everything of a trainer but the weights, as plain values."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._waiting: Mapping[str, Any] | None = None
        self._gradients: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Lightning's own checkpoint and what is missing in it."""
        trainer = self.trainer
        connector = trainer._logger_connector
        dumped = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        module = trainer.lightning_module
        kept = {name: value for name, value in dumped.items() if name not in _NOT_KEPT}
        if _is_same(dumped["state_dict"], module.state_dict()):  # model.pth; a callback may have put others
            del kept["state_dict"]
        state = {
            "checkpoint": kept,
            "should_stop": trainer.should_stop,
            "callback_metrics": {name: value.detach().clone() for name, value in trainer.callback_metrics.items()},
            "gathered": [_gathered(key, metric) for key, metric in trainer.fit_loop.epoch_loop._results.items()],
            "torchmetrics": {
                name: {"state": dict(metric.metric_state), "updates": metric._update_count}
                for name, metric in _metrics_of(module)
            },
            "logging": [connector._first_loop_iter, connector._current_fx],
        }  # fmt: skip
        return canonical(state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what must be there before training starts; the rest waits for the first batch."""
        trainer, connector = self.trainer, self.trainer._checkpoint_connector
        checkpoint = {"state_dict": trainer.lightning_module.state_dict(), **state["checkpoint"]}
        for name, here in (
            ("optimizer_states", trainer.optimizers),
            ("lr_schedulers", trainer.lr_scheduler_configs),
        ):
            if len(checkpoint[name]) != len(here):
                raise ValueError(f"it holds {len(checkpoint[name])} {name}, this training has {len(here)}")
        connector._loaded_checkpoint = checkpoint
        trainer.lightning_module.on_load_checkpoint(checkpoint)
        connector.restore_datamodule()
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_optimizers_and_schedulers()
        connector._loaded_checkpoint = {}
        trainer.should_stop = state["should_stop"]
        trainer.num_sanity_val_steps = 0  # it would forget what was logged; Lightning leaves it out as well
        trainer.callback_metrics.update(state["callback_metrics"])
        self._waiting = state
        self._put(trainer.fit_loop, checkpoint["loops"]["fit_loop"])
        progress = trainer.fit_loop.epoch_progress
        for counts in (progress.total, progress.current):  # the epoch is begun once more, with its hooks
            counts.ready = counts.started = counts.processed = counts.completed

    def keep_gradients(self) -> None:
        """Those of a half accumulated update, which Lightning throws away before its first step."""
        parameters = self.trainer.lightning_module.parameters()
        self._gradients = [(each, each.grad) for each in parameters if each.grad is not None]

    def put_progress(self) -> None:
        """Where Lightning waits for its first batch: make it the very place the state was taken at."""
        if self._waiting is None:
            return
        state, self._waiting = self._waiting, None
        trainer = self.trainer
        fit_loop, connector = trainer.fit_loop, trainer._logger_connector
        self._put(fit_loop, state["checkpoint"]["loops"]["fit_loop"])
        fit_loop._data_fetcher.fetched = fit_loop.epoch_loop.batch_progress.current.ready
        trainer.callback_metrics.update(state["callback_metrics"])
        results = fit_loop.epoch_loop._results
        metrics = dict(_metrics_of(trainer.lightning_module))
        for name, saved in state["torchmetrics"].items():
            for key, value in saved["state"].items():
                setattr(metrics[name], key, value)
            metrics[name]._update_count = saved["updates"]
            metrics[name]._computed = None
        for saved in state["gathered"]:
            results[saved["key"]] = _scattered(saved, metrics, trainer)
        connector._first_loop_iter, connector._current_fx = state["logging"]
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    @staticmethod
    def _put(fit_loop: Any, saved: dict[str, Any]) -> None:
        """Progress without the flags of a restart, after which Lightning guesses what it had done."""
        fit_loop.load_state_dict(saved)
        epoch_loop = fit_loop.epoch_loop
        for loop in (
            fit_loop, epoch_loop, epoch_loop.val_loop, epoch_loop.automatic_optimization, epoch_loop.manual_optimization,
        ):  # fmt: skip
            loop.on_iteration_done()


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(value, torch.Tensor) and value.data_ptr() == other[name].data_ptr()
        for name, value in one.items()
    )


def _metrics_of(module: torch.nn.Module) -> Iterator[tuple[str, Metric]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Metric))


# --- what `self.log` has gathered of an epoch ------------------------------------------------

_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph",
    "add_dataloader_idx", "dataloader_idx", "metric_attribute",
)  # fmt: skip


def _gathered(key: str, metric: _ResultMetric) -> dict[str, Any]:
    meta = metric.meta
    return {
        "key": key,
        "meta": {name: getattr(meta, name) for name in _FIELDS},
        "reduce_fx": meta.reduce_fx.__name__,
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "updates": metric._update_count,
        "value": metric.value if metric.is_tensor else None,
        "batch_size": metric.cumulated_batch_size if hasattr(metric, "cumulated_batch_size") else None,
        "last": metric._forward_cache,
    }


def _scattered(saved: Mapping[str, Any], metrics: Mapping[str, Metric], trainer: Trainer) -> _ResultMetric:
    meta = _Metadata(**saved["meta"], reduce_fx=getattr(torch, saved["reduce_fx"]))
    should, rank_zero_only = saved["sync"]
    meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=rank_zero_only)
    metric = _ResultMetric(meta, saved["is_tensor"])
    metric.value = saved["value"] if saved["is_tensor"] else metrics[saved["meta"]["metric_attribute"]]
    if saved["batch_size"] is not None:
        metric.cumulated_batch_size = saved["batch_size"]
    metric.has_reset, metric._update_count = saved["has_reset"], saved["updates"]
    metric._forward_cache = saved["last"]
    return metric
