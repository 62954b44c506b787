"""Data order as a function of (seed, epoch), so that any position is reached without a replay.

- A DataLoader with `batch_size` and `shuffle`: the permutation is made here, from (seed, epoch).
- Any other sampler or batch sampler with a length: its indices are drawn once an epoch, with all
  generators seeded by (seed, epoch), and the rest of the list is handed out. All ranks draw the same
  list, and share each step's samples out.
- An IterableDataset with `state_dict` and `load_state_dict`: it is put back to where it was, in
  each of the loader's processes.
- A loader with `state_dict` and `load_state_dict` of its own (torchdata's) is asked itself.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

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
from sweeper.torch.drawing import (
    Drawing,
    derived_seed,
    generators_kept,
    has_state,
    length_of,
    seed_generators,
)
from sweeper.torch.ranks import Ranks
from sweeper.torch.streams import InitProcess, Stream


class Order(Sampler[list[int]]):
    """Batches of indices of one epoch, from a position on.

    Attributes:
        epoch: Which epoch's.
        position: Where in it to begin; what it counts is the order's own affair.
        drawing: The user's sampler, if there is one.
        drawn: What that has drawn for this epoch.
    """

    epoch = 0
    position = 0
    drawing: Drawing | None = None
    drawn: Sequence[Any] = ()

    def begin(self, epoch: int, position: int) -> None:
        """Go to a place; what the user's sampler has to say to an epoch, it says now."""
        self.epoch, self.position = epoch, position
        if self.drawing is not None:
            self.drawn = self.drawing.draw(epoch)

    @abc.abstractmethod
    def after(self, position: int) -> int:
        """The position after the step at `position`."""

    @abc.abstractmethod
    def after_alone(self, batches: int) -> int:
        """The position after so many batches of an epoch, for one rank alone."""

    @abc.abstractmethod
    def batches_left(self, position: int) -> int:
        """Steps from `position` to the end of the epoch."""


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

    def after(self, position: int) -> int:
        following = min(position + self.batch_size * self.world_size, self.size)
        left = self.size - following
        return self.size if left < self.world_size and not self.drop_last else following

    def after_alone(self, batches: int) -> int:
        return min(batches * self.batch_size, self.size)

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
            yield share(order[position:following], self.rank, self.world_size)
            position = following

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()


class SampleOrder(EpochOrder):
    """The same for the samples that a sampler of the user's draws, one after the other."""

    def __init__(
        self, drawing: Drawing, *, batch_size: int, drop_last: bool, rank: int, world_size: int
    ) -> None:
        super().__init__(
            len(drawing), batch_size=batch_size, drop_last=drop_last, shuffle=False, seed=0, rank=rank, world_size=world_size
        )  # fmt: skip
        self.drawing = drawing

    def _order(self) -> list[int]:
        return list(self.drawn)


class BatchOrder(Order):
    """The batches that a sampler of the user's draws. Positions count batches of all ranks.

    Each step takes one for each rank. Should fewer be left than there are ranks, these share their samples.
    """

    def __init__(self, drawing: Drawing, *, rank: int, world_size: int) -> None:
        self.drawing = self._given = drawing
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return self.batches_left(0)

    def after(self, position: int) -> int:
        return min(position + self.world_size, len(self._given))

    def after_alone(self, batches: int) -> int:
        return batches

    def batches_left(self, position: int) -> int:
        return -(-max(0, len(self._given) - position) // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(self.position, len(self.drawn), self.world_size):
            step = self.drawn[start : start + self.world_size]
            if len(step) == self.world_size:
                yield step[self.rank]
            else:
                yield share([index for batch in step for index in batch], self.rank, self.world_size)


def share(samples: list[int], rank: int, world_size: int) -> list[int]:
    """One rank's share of a step: the first ranks have one more when it is not even."""
    each, more = divmod(len(samples), world_size)
    start = rank * each + min(rank, more)
    # Only where a step has fewer samples than there are ranks can a share be empty.
    return samples[start : start + each + (rank < more)] or samples[:1]


class SeededSamples(Dataset[Any]):
    """A data set whose every sample is drawn with generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self._seed = dataset, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed_generators(derived_seed(self._seed, "sample", self.epoch, index))
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

    def __init__(self, loader: DataLoader[Any], *, seed: int, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - frozen
        self._seed, self._ranks = seed, ranks
        self.position = 0
        self._is_put_back = False
        self._generator = torch.Generator()
        self._own: Any = loader if has_state(loader) else None
        self._stream: Stream | None = None
        self._order: Order | None = None
        self._samples: SeededSamples | None = None
        self.num_batches: int | None = None
        if self._own is not None:
            self._loader, self.num_batches = loader, length_of(loader)
            return
        _check_plain(loader)
        if isinstance(loader.dataset, IterableDataset):
            self._stream = Stream(loader)
            self._loader = self._stream.loader(self._generator)
            # Each process, and each rank, may have a part of any length.
            if loader.num_workers <= 1 and ranks.world_size == 1:
                self.num_batches = length_of(loader)
        else:
            self._order = _order_of(loader, seed, rank=ranks.rank, world_size=ranks.world_size)
            self.num_batches = len(self._order)  # type: ignore[arg-type]
            self._loader = self._ordered(loader, self._order)

    def _ordered(self, loader: DataLoader[Any], order: Order) -> DataLoader[Any]:
        how: dict[str, Any] = (
            {"sampler": order, "batch_size": None}
            if loader.batch_sampler is None
            else {"batch_sampler": order}
        )
        if loader.num_workers:
            self._samples = SeededSamples(loader.dataset, self._seed)
        return DataLoader(
            loader.dataset if self._samples is None else self._samples,
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
        return self._order is not None

    @property
    def is_stream(self) -> bool:
        """Whether an epoch is over only when the data itself has come to its end."""
        return self._stream is not None

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
        """The position after so many batches of an epoch that one rank alone has read."""
        return batches if self._order is None else self._order.after_alone(batches)

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch from `position` on. Collective.

        Raises:
            ConfigError: The data is not what it says it is, or not the same on all ranks.
        """
        self._generator.manual_seed(derived_seed(self._seed, "workers", epoch))
        if self._order is None:
            batches = (
                self._own_epoch(epoch)
                if self._stream is None
                else self._stream.epoch(self._loader, epoch, is_start=self.position == 0)
            )
            return batches if self.num_batches is None else self._counted(batches, self.num_batches)
        self._order.begin(epoch, self.position)
        if self._samples is not None:
            self._samples.epoch = epoch
        if self._order.drawing is not None and self._ranks.world_size > 1:
            self._check_drawn(self._order.drawing.name, self._order.drawn)
        return iter(self._loader)

    def _check_drawn(self, name: str, drawn: Sequence[Any]) -> None:
        digests = self._ranks.everywhere(sha256(repr(list(drawn)).encode()).hexdigest())
        if len(set(digests)) > 1:
            raise ConfigError(
                f"the sampler {name} draws other samples on rank {self._ranks.rank} than elsewhere",
                why="each step's samples are shared out among the ranks, from one list",
                do="Let it depend on its seed, its epoch and the global generators only.",
            )

    def _counted(self, batches: Iterator[Any], length: int) -> Iterator[Any]:
        """The same, unless they are not as many as was said."""
        left = length - self.position
        for batch in batches:
            left -= 1
            if left < 0:
                break
            yield batch
        if left < 0 or (left > 0 and self._stream is not None):
            than = "more" if left < 0 else "fewer"
            raise ConfigError(
                f"the data has a length of {length} batches, and gave {than}",
                do="Its __len__ must be right in every epoch; without one, the end of an epoch is not known ahead.",
            )

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
        with generators_kept():  # making an iterator draws from them, and is done anew by a resume
            seed_generators(derived_seed(self._seed, "loader", epoch))
            return iter(self._loader)

    # --- data that keeps its position itself -----------------------------------------------

    @property
    def _kind(self) -> str | None:
        has_drawing = self._order is not None and self._order.drawing is not None
        return (
            "stream" if self._stream is not None
            else "loader" if self._own is not None
            else "sampler" if has_drawing
            else None
        )  # fmt: skip

    @property
    def is_same_everywhere(self) -> bool:
        """Whether what `state_dict` returns is the same on all ranks."""
        return self._order is not None

    def state_dict(self) -> dict[str, Any]:
        """What the position is beside epoch and batch; empty when those say it all."""
        if self._stream is not None:
            return {"stream": self._stream.state_dict()}
        if self._own is not None:
            return {"loader": self._own.state_dict()}
        assert self._order is not None
        drawing = self._order.drawing
        state = {} if drawing is None else drawing.state_dict(is_between=self.position == 0)
        return {"sampler": state} if state else {}

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise CheckpointRefused when `state` is of another kind of data."""
        kind, saved = self._kind, next(iter(state), None) if state else None
        if saved is None and kind in ("stream", "loader"):
            raise CheckpointRefused(
                "it does not say where this rank's data was", why="it had another kind of data loader"
            )
        if saved is not None and saved != kind:
            raise CheckpointRefused("it was made with another kind of data loader")
        if self._stream is not None and state is not None:
            self._stream.check(state["stream"])

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go to where `state_dict` was."""
        if not state:
            return
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"])
        elif self._own is not None:
            self._own.load_state_dict(state["loader"])
            self._is_put_back = True
        elif self._order is not None and self._order.drawing is not None:
            self._order.drawing.load_state_dict(state["sampler"])


_END = object()


def _check_plain(loader: Any) -> None:
    """Refuse what is no DataLoader, or does something of its own that would be left out. Raises ConfigError."""
    name = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"the loader, a {name}, cannot say where it is",
            do="Pass a DataLoader, or give it state_dict() and load_state_dict().",
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"the loader {name} has an __iter__ of its own, which would be left out",
            why="the loop reads its data set in an order of its own",
            do="Do it in collate_fn, in the data set or in the loop; or give the loader state_dict() and load_state_dict().",
        )


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
    if type(batches) is BatchSampler:
        drawing = Drawing(sampler, seed=seed)
        return SampleOrder(
            drawing, batch_size=batches.batch_size, drop_last=batches.drop_last, rank=rank, world_size=world_size
        )  # fmt: skip
    if batches is None and world_size > 1:  # its items are handed out as they are
        raise ConfigError(
            "a loader with batch_size=None cannot be shared out among several ranks",
            do="Give it a batch_size.",
        )
    drawing = Drawing(loader.sampler if batches is None else batches, seed=seed)
    return BatchOrder(drawing, rank=rank, world_size=world_size)
