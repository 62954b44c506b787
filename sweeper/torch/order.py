"""Data order as a function of (seed, epoch), so that any position is reached without a replay.

- A DataLoader with `batch_size` and `shuffle`: the permutation is made here, from (seed, epoch).
- Any other sampler or batch sampler with a length: its indices are drawn once an epoch, with all
  generators seeded by (seed, epoch), and the rest of the list is handed out.
- An IterableDataset with `state_dict` and `load_state_dict`: it is put back to where it was, in
  each of the loader's processes.
- A loader with `state_dict` and `load_state_dict` of its own (torchdata's) is asked itself.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
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
    Sampler,
    SequentialSampler,
)

from sweeper.errors import CheckpointRefused, ConfigError
from sweeper.torch.streams import InitProcess, Stream


def derived_seed(seed: int, *words: object) -> int:
    """A 63-bit seed from a seed and words: independent streams from one number."""
    text = ":".join(map(str, (seed, *words)))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch's CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class Order(Sampler[list[int]]):
    """Batches of indices of one epoch, from a position on.

    Attributes:
        epoch: Which epoch's.
        position: Where in it to begin; what it counts is the order's own affair.
    """

    epoch = 0
    position = 0
    is_reshardable = False

    def after(self, position: int) -> int:
        """The position after the batch at `position`."""
        return position + 1

    @property
    def end(self) -> int:
        """The position after the last batch."""
        return len(self)  # type: ignore[arg-type]

    def batches_left(self, position: int) -> int:
        """Batches from `position` to the end of the epoch."""
        return self.end - position


class EpochOrder(Order):
    """What `batch_size` and `shuffle` mean, on one rank of any number. Positions count samples of all ranks.

    Each step takes the next `batch_size` samples for each rank. At the end of an epoch the ranks share
    what is left as evenly as can be; what is too little to give every rank a sample joins the step
    before. So each sample is seen exactly once, also when the number of ranks changes in between.

    Args:
        size: Number of samples.
        batch_size: Samples a batch and rank.
        drop_last: Leave out a last step that is not full.
        shuffle: A new permutation each epoch; else 0, 1, 2, ….
        seed: Seed of all permutations.
        rank, world_size: Whose batches.
    """

    is_reshardable = True

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        drop_last: bool,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.drop_last = size, batch_size, drop_last
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.batches_left(0)

    @property
    def end(self) -> int:
        stride = self.batch_size * self.world_size
        return self.size // stride * stride if self.drop_last else self.size

    def after(self, position: int) -> int:
        following = min(position + self.batch_size * self.world_size, self.size)
        left = self.size - following
        return self.size if left < self.world_size and not self.drop_last else following

    def batches_left(self, position: int) -> int:
        stride = self.batch_size * self.world_size
        full, rest = divmod(max(0, self.size - position), stride)
        if self.drop_last:
            return full
        joins = full > 0 and 0 < rest < self.world_size
        return full + (rest > 0 and not joins)

    def __iter__(self) -> Iterator[list[int]]:
        order, position = self._order(), self.position
        for _ in range(self.batches_left(position)):
            following = self.after(position)
            yield self._mine(order[position:following])
            position = following

    def _mine(self, samples: list[int]) -> list[int]:
        """This rank's share of a step: the first ranks have one more when it is not even."""
        each, more = divmod(len(samples), self.world_size)
        start = self.rank * each + min(self.rank, more)
        # Only after a change to more ranks than samples are left can a share be empty.
        return samples[start : start + each + (self.rank < more)] or samples[:1]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()


class SamplerOrder(Order):
    """What a sampler of the user's draws, made a function of (seed, epoch).

    `set_epoch` is called where there is one; a `generator` of its own is seeded, and so are the
    global ones, which get their states back.
    """

    def __init__(self, batches: Iterable[list[int]], *, seed: int) -> None:
        self._batches, self.seed = batches, seed
        self._samplers = [
            batches,
            *([inner] if (inner := getattr(batches, "sampler", None)) is not None else []),
        ]

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        seed = derived_seed(self.seed, "order", self.epoch)
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        with _generators_kept():
            seed_generators(seed)
            drawn = list(self._batches)
        if len(drawn) != len(self):
            raise ConfigError(
                f"the sampler {type(self._batches).__name__} says it has length {len(self)}, and gave {len(drawn)}",
                do="Its __len__ must be right in every epoch.",
            )
        yield from drawn[self.position :]


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededSamples(Dataset[Any]):
    """A data set whose every sample is drawn with generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], order: Order, seed: int) -> None:
        self.dataset, self._order, self._seed = dataset, order, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed_generators(derived_seed(self._seed, "sample", self._order.epoch, index))
        return self.dataset[index]


class OrderedLoader:
    """The user's DataLoader with its order made repeatable.

    Its processes are started anew for each epoch. In them every sample is drawn from generators
    seeded by (seed, epoch, index), so that random augmentation does not depend on which samples
    the process had before; without processes the trainer's own generators are used, and restored.

    Attributes:
        num_batches: Batches in an epoch; None when the data has no length.
        position: Where in the epoch the next batch begins, as its order counts.

    Raises:
        ConfigError: Its order cannot be repeated.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._seed = seed
        self.position = 0
        self._is_put_back = False
        self._generator = torch.Generator()
        self._own: Any = loader if hasattr(loader, "state_dict") else None
        self._stream: Stream | None = None
        self._order: Order | None = None
        self.num_batches: int | None = None
        if self._own is not None:
            self._loader, self.num_batches = loader, _length(loader)
        elif isinstance(loader.dataset, IterableDataset):
            self._stream = Stream(loader)
            self._loader = self._stream.loader(self._generator)
        else:
            self._order = _order_of(loader, seed, rank=rank, world_size=world_size)
            self.num_batches = len(self._order)  # type: ignore[arg-type]
            self._loader = self._ordered(loader, self._order)

    def _ordered(self, loader: DataLoader[Any], order: Order) -> DataLoader[Any]:
        how: dict[str, Any] = (
            {"sampler": order, "batch_size": None}
            if loader.batch_sampler is None
            else {"batch_sampler": order}
        )
        return DataLoader(
            SeededSamples(loader.dataset, order, self._seed) if loader.num_workers else loader.dataset,
            **how,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=InitProcess(loader.worker_init_fn) if loader.num_workers else None,
            multiprocessing_context=loader.multiprocessing_context,
            # Its own generator: making an iterator must not draw from the global one.
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
        )

    @property
    def is_reshardable(self) -> bool:
        """Whether the rest of an epoch can be shared out among another number of ranks."""
        return self._order is not None and self._order.is_reshardable

    def updates_left(self, accumulate: int) -> int:
        """Optimizer updates from here to the end of the epoch; 0 when that is not known."""
        return (
            0 if self._order is None and self.num_batches is None else -(-self._batches_left() // accumulate)
        )

    def _batches_left(self) -> int:
        return (
            (self.num_batches or 0) - self.position
            if self._order is None
            else self._order.batches_left(self.position)
        )

    def num_updates(self, accumulate: int) -> int:
        """Optimizer updates in an epoch; 0 when that is not known."""
        return 0 if self.num_batches is None else -(-self.num_batches // accumulate)

    def advance(self) -> bool:
        """Take note that a batch was handed out. Returns whether it is known to be the epoch's last."""
        self.position = self.position + 1 if self._order is None else self._order.after(self.position)
        return self._batches_left() == 0 and self.num_batches is not None

    def position_of(self, batches: int) -> int:
        """The position after so many batches of an epoch."""
        position = 0
        for _ in range(batches):
            position = position + 1 if self._order is None else self._order.after(position)
        return position

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch from `position` on."""
        self._generator.manual_seed(derived_seed(self._seed, "workers", epoch))
        if self._order is not None:
            self._order.epoch, self._order.position = epoch, self.position
            return iter(self._loader)
        if self._stream is not None:
            return self._stream.epoch(self._loader, epoch, is_start=self.position == 0)
        return self._own_epoch(epoch)

    def _own_epoch(self, epoch: int) -> Iterator[Any]:
        batches = self._own_iterator(epoch)
        first = next(batches, _END)
        # Put back to the end of an epoch, it has that end still ahead.
        if first is _END and self._is_put_back and self.position == 0:
            batches = self._own_iterator(epoch)
            first = next(batches, _END)
        self._is_put_back = False
        if first is not _END:
            yield first
            yield from batches

    def _own_iterator(self, epoch: int) -> Iterator[Any]:
        with _generators_kept():  # making an iterator draws from them, and is done anew by a resume
            seed_generators(derived_seed(self._seed, "loader", epoch))
            return iter(self._loader)

    # --- data that keeps its position itself -----------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the position is beside epoch and batch; empty when those say it all."""
        if self._stream is not None:
            return {"stream": self._stream.state_dict()}
        return {} if self._own is None else {"loader": self._own.state_dict()}

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise CheckpointRefused when `state` is of another kind of data."""
        kind = "stream" if self._stream is not None else "loader" if self._own is not None else None
        if (state is None) != (kind is None) or (state is not None and kind not in state):
            raise CheckpointRefused("it was made with another kind of data loader")
        if self._stream is not None and state is not None:
            self._stream.check(state["stream"])

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go to where `state_dict` was."""
        if self._stream is not None and state is not None:
            self._stream.load_state_dict(state["stream"])
        elif self._own is not None and state is not None:
            self._own.load_state_dict(state["loader"])
            self._is_put_back = True


_END = object()


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _order_of(loader: DataLoader[Any], seed: int, *, rank: int, world_size: int) -> Order:
    batches, sampler = loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)
    is_random = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if type(batches) is BatchSampler and (is_random or type(sampler) is SequentialSampler):
        return EpochOrder(
            len(loader.dataset),  # type: ignore[arg-type]
            batch_size=batches.batch_size,
            drop_last=batches.drop_last,
            shuffle=is_random,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
    if batches is None:  # batch_size=None: the sampler's items are handed out as they are
        batches = loader.sampler
    if _length(batches) is None:
        raise ConfigError(
            f"the loader's sampler {type(sampler or loader.sampler).__name__} has no length",
            do="Give it a __len__, or pass a DataLoader with batch_size and shuffle.",
        )
    return SamplerOrder(batches, seed=seed)
