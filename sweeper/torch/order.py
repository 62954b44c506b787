"""Data order as a function of (seed, epoch), so that any position is reached in O(1)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from sweeper.errors import ConfigError


def derived_seed(seed: int, *words: object) -> int:
    """A 63-bit seed from a seed and words: independent streams from one number."""
    text = ":".join(map(str, (seed, *words)))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


class EpochOrder(BatchSampler):
    """Batches of indices of one epoch, starting at a given batch.

    Args:
        size: Number of samples.
        batch_size: Samples a batch.
        drop_last: Leave out a last batch that is not full.
        shuffle: A new permutation each epoch; else 0, 1, 2, ….
        seed: Seed of all permutations.
    """

    def __init__(self, size: int, *, batch_size: int, drop_last: bool, shuffle: bool, seed: int) -> None:
        self.size, self.batch_size, self.drop_last = size, batch_size, drop_last
        self.shuffle, self.seed = shuffle, seed
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for batch in range(self.first_batch, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()


class SeededSamples(Dataset[Any]):
    """A data set whose every sample is drawn with generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], order: EpochOrder) -> None:
        self._dataset, self._order = dataset, order

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed = derived_seed(self._order.seed, "sample", self._order.epoch, index)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        return self._dataset[index]


class OrderedLoader:
    """The user's DataLoader with its order replaced by an `EpochOrder`.

    Its processes are started anew for each epoch. In them every sample is drawn from generators
    seeded by (seed, epoch, index), so that random augmentation does not depend on which samples
    the process had before; without processes the trainer's own generators are used, and restored.

    Raises:
        ConfigError: Its order cannot be repeated: an IterableDataset or a sampler of the user's.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int) -> None:
        self._seed = seed
        self._generator = torch.Generator()
        self._order = _order_of(loader, seed)
        self._loader = DataLoader(
            SeededSamples(loader.dataset, self._order) if loader.num_workers else loader.dataset,
            batch_sampler=self._order,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            # Its own generator: making an iterator must not draw from the global one.
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    def epoch(self, epoch: int, *, first_batch: int) -> Iterator[Any]:
        """The batches of one epoch from `first_batch` on."""
        self._order.epoch, self._order.first_batch = epoch, first_batch
        self._generator.manual_seed(derived_seed(self._seed, "workers", epoch))
        return iter(self._loader)


def _order_of(loader: DataLoader[Any], seed: int) -> EpochOrder:
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError("an IterableDataset has no positions to return to", do="Use a map-style dataset.")
    batches, sampler = loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)
    is_random = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if type(batches) is not BatchSampler or not (is_random or type(sampler) is SequentialSampler):
        raise ConfigError(
            f"the loader's sampler {type(sampler or batches).__name__} cannot be resumed exactly",
            do="Pass a DataLoader with batch_size and shuffle; its order is then made from the run's seed.",
        )
    return EpochOrder(
        len(loader.dataset),  # type: ignore[arg-type]
        batch_size=batches.batch_size,
        drop_last=batches.drop_last,
        shuffle=is_random,
        seed=seed,
    )
