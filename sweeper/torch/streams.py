"""IterableDatasets that know their position, in any number of loader processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sweeper import processes
from sweeper.errors import CheckpointRefused, ConfigError

Item = tuple[int, Any, Any]
"""(process, batch, where the process is after it); the batch is `SKIP` where the turn was over already."""
SKIP = "skip"


class Stream:
    """Batches of an IterableDataset, each with the state of the process that made it.

    A loader's processes take turns. `set_epoch` is called where there is one. A resume puts each process's data set back to its state, and
    lets those whose turn had been in this round send a placeholder first, so that the turns agree.

    Raises:
        ConfigError: The data set cannot say or take its position.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        dataset = loader.dataset
        if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
            raise ConfigError(
                f"the IterableDataset {type(dataset).__name__} has no position to return to",
                do="Give it state_dict() and load_state_dict(), or use a map-style data set.",
            )
        self._given = loader
        self._num_processes = max(1, loader.num_workers)
        self._batches = _Batches(loader)
        self._states: list[dict[str, Any] | None] = [None] * self._num_processes
        self._turn = 0

    def loader(self, generator: torch.Generator) -> DataLoader[Any]:
        """A loader of items instead of batches."""
        given = self._given
        return DataLoader(
            self._batches,
            batch_size=None,
            num_workers=given.num_workers,
            collate_fn=_as_it_is,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=InitProcess(given.worker_init_fn),
            multiprocessing_context=given.multiprocessing_context,
            generator=generator,
            prefetch_factor=given.prefetch_factor,
        )

    def epoch(self, loader: DataLoader[Any], epoch: int, *, is_start: bool) -> Iterator[Any]:
        """The batches from here to the end of the epoch."""
        if hasattr(self._given.dataset, "set_epoch"):
            self._given.dataset.set_epoch(epoch)
        if is_start:
            self._states, self._turn = [None] * self._num_processes, 0
        self._batches.start = (list(self._states), self._turn)
        for process, batch, state in loader:
            if isinstance(batch, str) and batch == SKIP:
                continue
            self._states[process] = state
            self._turn = (process + 1) % self._num_processes
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, and whose turn it is."""
        return {"states": self._states, "turn": self._turn}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointRefused for another number of processes."""
        if len(state["states"]) != self._num_processes:
            raise CheckpointRefused(
                f"its data was read by {len(state['states'])} processes, the loader has {self._num_processes}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was."""
        self._states, self._turn = list(state["states"]), state["turn"]


def _as_it_is(item: Any) -> Any:
    return item


class InitProcess:
    """`worker_init_fn` of a loader's process, which finds the user's own data set in `get_worker_info()`.

    A signal that reaches all processes of a job is its trainer's affair.
    """

    def __init__(self, given: Callable[[int], None] | None) -> None:
        self._given = given

    def __call__(self, process: int) -> None:
        processes.ignore_signals()
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses a plain assignment
        if self._given is not None:
            self._given(process)


class _Batches(IterableDataset[Item]):
    """The user's data set, batched in the process that reads it."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self._batch_size, self._drop_last, self._collate = (
            loader.batch_size,
            loader.drop_last,
            loader.collate_fn,
        )
        self.start: tuple[list[Any], int] = ([None], 0)

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        process = 0 if info is None else info.id
        states, turn = self.start
        if process < turn:
            yield process, SKIP, None
        if (place := states[process]) is not None:
            self.dataset.load_state_dict(copy.deepcopy(place["state"]))
            if place["is_over"]:
                return
        samples: list[Any] = []
        for sample in self.dataset:
            if self._batch_size is None:
                yield process, self._collate(sample), self._place()
                continue
            samples.append(sample)
            if len(samples) == self._batch_size:
                yield process, self._collate(samples), self._place()
                samples = []
        if samples and not self._drop_last:
            # By now the data set may say that it is at its beginning again.
            yield process, self._collate(samples), self._place(is_over=True)

    def _place(self, *, is_over: bool = False) -> dict[str, Any]:
        return {"state": copy.deepcopy(self.dataset.state_dict()), "is_over": is_over}
