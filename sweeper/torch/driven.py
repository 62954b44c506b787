"""A loop that somebody else's trainer drives, one batch at a time: what the adapters share."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from sweeper.errors import ConfigError
from sweeper.torch.loop import Loop
from sweeper.trainer.run import Run


class DrivenLoop(Loop):
    """Hands out a batch only after the boundary of the step before.

    So whatever a trainer does after a step (validation, schedules, its callbacks) belongs to that
    step, and a checkpoint is always taken at the same place of the trainer's code: where it waits
    for the next batch.

    Attributes:
        was_restored: It stands where an earlier attempt was interrupted.
    """

    was_restored = False
    _is_over = False
    _steps: Iterator[Any]
    _only_updates: bool

    @classmethod
    def restored(
        cls, run: Run, *, model: torch.nn.Module, loader: DataLoader[Any], parts: Mapping[str, Any]
    ) -> Self:
        """As `resumable`: the loop, and everything else, where this run was interrupted."""
        loop = cls(run, model=model, loader=loader, parts=parts)
        if loop._ranks.world_size > 1:
            raise ConfigError("this adapter trains in one process", do="Use resumable() for several ranks.")
        loop._restore()
        loop.was_restored = loop._is_replaying
        run.at_end(loop._save_last)
        return loop

    @property
    def num_batches(self) -> int:
        """Batches in an epoch.

        Raises:
            ConfigError: The data has no length.
        """
        if self._loader.num_batches is None or self._loader.is_stream:
            raise ConfigError("the training data has no length", do="Give it a __len__, or use resumable().")
        return self._loader.num_batches

    def drive(self, *, epochs: int, max_steps: int, accumulate: int, only_updates: bool = False) -> None:
        """Say where to end, as `batches` is told; nothing happens before the first batch.

        Args:
            only_updates: The trainer fetches all batches of an update before the first one is used,
                so that there is no boundary between them.
        """
        self._only_updates = only_updates
        self._steps = self.batches(epochs=epochs, max_steps=max_steps, accumulate=accumulate)

    def next_batch(self, *, epoch: int | None = None, index: int) -> Any:
        """The boundary of the step in progress, then the next batch.

        Args:
            epoch, index: Which one the trainer expects, both from 0.

        Raises:
            ConfigError: The trainer has left out something.
            Preempted, TrialPruned: As from `batches`.
        """
        batch = next(self._steps)
        if index != self.step_in_epoch - 1 or epoch not in (None, self.epoch):
            raise ConfigError(
                f"the trainer is at batch {index} of its epoch, the data at batch {self.step_in_epoch - 1} of epoch {self.epoch}",
                why="an epoch that ends before its data does cannot be resumed exactly",
                do="Stop a training at max_steps, or at the end of an epoch.",
            )
        return batch

    def finish(self) -> None:
        """The boundary of the last step: the trainer is at its end, whatever the limits were."""
        self._is_over = True
        for _ in self._steps:
            raise AssertionError("a loop that is over has no batch")
        self._flush_row()  # of an update that will not be completed
        self._save(wait=True, is_last=True)

    @property
    def _is_done(self) -> bool:
        return self._is_over or super()._is_done

    def _leave(self) -> None:
        """Whether a training is over is for its trainer to say, by `finish`."""

    def _boundary(self) -> None:
        if self.is_update or not self._only_updates:
            super()._boundary()


def canonical(value: Any) -> Any:
    """The same values in containers of their own, with each text one object.

    Pickle writes an object it has met before as a reference, so that equal states could have other
    bytes when one of them was read back from a file.
    """
    if isinstance(value, str):
        return sys.intern(str(value))
    if type(value) in (dict, OrderedDict):
        return type(value)((canonical(key), canonical(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(canonical(item) for item in value)
    return value
