"""Samplers, streams and loaders of any kind: an interruption repeats no sample and skips none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import check_every_interruption, flat, new_run, read, samples_of
from crash import mini
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from sweeper.errors import ConfigError, SweeperError
from sweeper.torch import Preempted, resumable
from sweeper.trainer.main import prepare_process

FEW = pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])


@pytest.fixture
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path


class Squares(Dataset):
    """Sample i is i, with noise that must be the same again, too."""

    def __init__(self, size: int = 7) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return [self[one] for one in index]
        return index + random.random() / 10


class Rotated(Sampler[int]):
    """Begins where its epoch says."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(index + self.epoch) % 7 for index in range(7)])

    def __len__(self) -> int:
        return 7


class Buckets(Sampler[list[int]]):
    """Batches of uneven sizes in an order that Python's generator draws."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1], [2], [3, 4, 5], [6]]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return 4


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0] * 6 + [9.0], num_samples=5, generator=torch.Generator())


SAMPLERS: dict[str, Any] = {
    "weighted": lambda: {"sampler": weighted(), "batch_size": 2},
    "weighted-global-generator": lambda: {"sampler": WeightedRandomSampler([1.0] * 7, 5), "batch_size": 2},
    "with-replacement": lambda: {"sampler": RandomSampler(Squares(), replacement=True, num_samples=9), "batch_size": 4},
    "subset": lambda: {"sampler": SubsetRandomSampler([1, 3, 5, 6], generator=torch.Generator()), "batch_size": 3},
    "set-epoch": lambda: {"sampler": Rotated(), "batch_size": 3},
    "batch-sampler": lambda: {"batch_sampler": Buckets()},
    "no-batches": lambda: {"sampler": RandomSampler(Squares()), "batch_size": None},
    "sampler-of-batches": lambda: {"sampler": BatchSampler(RandomSampler(Squares()), 3, False), "batch_size": None},
    "drop-last": lambda: {"batch_size": 3, "shuffle": True, "drop_last": True},
}  # fmt: skip


@FEW
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(base: Path, name: str, num_workers: int) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Squares(), num_workers=num_workers, **SAMPLERS[name]())

    at = None if num_workers == 0 else [1, 3, 4]
    whole = check_every_interruption(base, make, epochs=2, at=at)
    order = [list(map(int, samples_of(whole, epoch))) for epoch in (0, 1)]
    assert order[0] != order[1], "another order each epoch"
    if name in ("set-epoch", "batch-sampler", "no-batches", "sampler-of-batches"):
        assert [sorted(epoch) for epoch in order] == [list(range(7))] * 2
    if name == "set-epoch":
        assert order[1] == [1, 2, 3, 4, 5, 6, 0]
    if name == "no-batches":
        assert all(isinstance(batch, float) for _, batch, _ in whole)


def test_a_sampler_that_is_wrong_about_its_length_is_refused(base: Path) -> None:
    class Wrong(Buckets):
        def __len__(self) -> int:
            return 3

    with pytest.raises(ConfigError, match="Wrong says it has length 3, and gave 4"):
        read(base / "x.r.00000", DataLoader(Squares(), batch_sampler=Wrong()), epochs=1)


def test_a_sampler_without_a_length_is_refused(base: Path) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(7))

    with pytest.raises(ConfigError, match="Endless has no length"):
        resumable(
            new_run(base / "x.r.00000"),
            model=nn.Linear(1, 1),
            loader=DataLoader(Squares(), sampler=Endless()),
        )


class Curriculum(Sampler[int]):
    """What it has drawn, it draws more often in the next epoch."""

    def __init__(self) -> None:
        self.weights = torch.ones(7)

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[int]:
        drawn = torch.multinomial(self.weights, 7, replacement=True)
        self.weights[drawn] *= 3
        return iter(drawn.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"].clone()


class Positioned(Sampler[int]):
    """As torchdata's: its state is where it is in its epoch, and how many there were."""

    def __init__(self) -> None:
        self.epoch = self.next = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[int]:
        for index in range(self.next, 7):
            self.next = index + 1
            yield (index + self.epoch) % 7
        self.next, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


@pytest.mark.parametrize("kind", [Curriculum, Positioned])
def test_samplers_that_keep_a_state(base: Path, kind: Any) -> None:
    whole = check_every_interruption(base, lambda: DataLoader(Squares(), sampler=kind(), batch_size=2))
    orders = [list(map(int, samples_of(whole, epoch))) for epoch in (0, 1, 2)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_what_the_training_changes_in_a_sampler_is_kept(base: Path, at: int) -> None:
    """As after every step: the epoch in progress stays what it was, the next one is another."""

    def go(name: str, *, stop_at: int | None = None) -> list[Any]:
        run, seen = new_run(base / name), []
        prepare_process(run.spec)
        sampler = Curriculum()
        loader = DataLoader(Squares(), sampler=sampler, batch_size=2)
        loop = resumable(run, model=nn.Linear(1, 1), loader=loader)
        try:
            for batch in loop.batches(epochs=3):
                seen.append(batch.tolist())
                sampler.weights[int(batch[0])] *= 5
                if loop.step == stop_at:
                    run._link.stop_reason = "asked to"  # type: ignore[misc]
        except Preempted:
            return seen
        run.finish()
        return seen

    whole = go("whole.r.00000")
    assert go("stopped.r.00000", stop_at=at) + go("stopped.r.00000") == whole


def test_a_sampler_that_leaves_data_to_other_ranks_is_refused(base: Path) -> None:
    sampler = DistributedSampler(Squares(), num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match="DistributedSampler leaves a part of the data to other ranks"):
        read(base / "x.r.00000", DataLoader(Squares(), sampler=sampler), epochs=1)


class Doubled(DataLoader):
    """A loader that does something of its own."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Doubled(Squares()), "the loader Doubled has an __iter__ of its own"),
        (lambda: [torch.ones(2)], "the loader, a list, cannot say where it is"),
    ],
)
def test_a_loader_that_would_be_left_out_is_refused(base: Path, make: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read(base / "x.r.00000", make(), epochs=1)
    assert caught.value.exit_code == 78
    assert "state_dict() and load_state_dict()" in str(caught.value)


# --- streams ---------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Each process reads a shard of its own, of another length; one has none."""

    def __init__(self, sizes: tuple[int, ...] = (5, 2, 0)) -> None:
        self.sizes = sizes
        self.next = self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        if info is None:
            shard = [
                100 * process + index for process, size in enumerate(self.sizes) for index in range(size)
            ]
        else:
            shard = [100 * info.id + index for index in range(self.sizes[info.id])]
        while self.next < len(shard):
            self.next += 1
            yield shard[self.next - 1] + 1000 * self.epoch
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "generator": torch.tensor([self.next]), "pair": (1, b"x")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["generator"].item() == state["next"]
        assert state["pair"] == (1, b"x")
        self.next = state["next"]


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_streams(base: Path, num_workers: int, batch_size: int | None, drop_last: bool) -> None:
    sizes = (5, 2, 0)[: max(1, num_workers)] if num_workers else (5, 2, 0)
    how: dict[str, Any] = {"drop_last": drop_last} if batch_size else {}

    def make() -> DataLoader[Any]:
        return DataLoader(Stream(sizes), batch_size=batch_size, num_workers=num_workers, **how)

    at = [2, 3] if num_workers == 1 else None
    whole = check_every_interruption(base, make, epochs=2, at=at)
    expected = [100 * process + index for process, size in enumerate(sizes) for index in range(size)]
    for epoch in (0, 1):
        seen = sorted(number - 1000 * epoch for number in samples_of(whole, epoch))
        if not how.get("drop_last"):
            assert seen == expected
        assert len(set(seen)) == len(seen)
    if batch_size is None:
        assert [len(flat(batch)) for _, batch, _ in whole] == [1] * len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 7), (7, 4, 1), (0, 0, 5), (3, 0, 3)])
def test_streams_of_uneven_lengths(base: Path, sizes: tuple[int, ...]) -> None:
    whole = check_every_interruption(
        base, lambda: DataLoader(Stream(sizes), batch_size=2, num_workers=3), epochs=2
    )
    for epoch in (0, 1):
        assert len(set(samples_of(whole, epoch))) == sum(sizes)


def test_a_stream_interrupted_again_and_again(base: Path) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=2)

    whole, seen = read(base / "whole.r.00000", make(), epochs=3), []
    for _ in whole:
        seen += read(base / "again.r.00000", make(), epochs=3, stop_after=1)
    assert seen == whole
    assert read(base / "again.r.00000", make(), epochs=3) == []


def test_a_stream_without_a_position_is_refused(base: Path) -> None:
    class Plain(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(ConfigError, match="Plain has no position to return to") as caught:
        resumable(new_run(base / "x.r.00000"), model=nn.Linear(1, 1), loader=DataLoader(Plain()))
    assert caught.value.exit_code == 78
    assert "state_dict() and load_state_dict()" in str(caught.value)


class Measured(Stream):
    """A stream that says how long it is, and may be wrong."""

    length = 7

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_with_a_length_knows_the_ends_of_its_epochs(base: Path, num_workers: int) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Measured((7,)), batch_size=2, num_workers=num_workers)

    check_every_interruption(base, make, at=None if num_workers == 0 else [3, 4, 5])
    loop = resumable(new_run(base / "x.r.00000"), model=nn.Linear(1, 1), loader=make())
    ends, updates = [], []
    for _ in loop.batches(epochs=2, accumulate=3):
        ends += [loop.step_in_epoch] if loop.is_epoch_end else []
        updates += [loop.step_in_epoch] if loop.is_update else []
    assert (ends, updates, loop.total_steps) == ([4, 4], [3, 4, 3, 4], 4)


@pytest.mark.parametrize(("size", "than"), [(9, "more"), (5, "fewer")])
def test_a_stream_that_is_wrong_about_its_length_is_refused(base: Path, size: int, than: str) -> None:
    loader = DataLoader(Measured((size,)), batch_size=2)
    with pytest.raises(ConfigError, match=f"has a length of 4 batches, and gave {than}"):
        read(base / "x.r.00000", loader, epochs=2)


def test_another_number_of_processes_is_refused_by_name(base: Path) -> None:
    directory = base / "x.r.00000"
    read(directory, DataLoader(Stream((5,)), batch_size=2), epochs=1, stop_after=2)
    with pytest.raises(SweeperError, match="read by 1 processes, the loader has 2"):
        read(directory, DataLoader(Stream((5, 2)), batch_size=2, num_workers=2), epochs=1)


def test_a_stream_whose_state_cannot_be_restored_is_said_at_the_first_save(base: Path) -> None:
    class Odd(Stream):
        def state_dict(self) -> dict[str, Any]:
            return {"at": random.Random()}

    with pytest.raises(ConfigError, match="could never be restored"):
        read(base / "x.r.00000", DataLoader(Odd(), batch_size=2), epochs=1, stop_after=1)


def shard_by_init(process: int) -> None:
    info = get_worker_info()
    info.dataset.sizes = (4, 3)  # the user's own data set, not something of ours


def test_worker_init_fn_finds_the_users_own_data_set(base: Path) -> None:
    stream = DataLoader(Stream((1, 1)), batch_size=2, num_workers=2, worker_init_fn=shard_by_init)
    assert sorted(samples_of(read(base / "x.r.00000", stream, epochs=1), 0)) == [0, 1, 2, 3, 100, 101, 102]
    squares = DataLoader(Squares(), batch_size=4, num_workers=1, worker_init_fn=set_size)
    assert len(samples_of(read(base / "y.r.00000", squares, epochs=1), 0)) == 7


def set_size(process: int) -> None:
    assert get_worker_info().dataset.size == 7


# --- loaders that know their position themselves ---------------------------------------------


class Own:
    """As torchdata's: put back to the end of an epoch it has that end still ahead.

    Args:
        is_eager: It is in its next epoch as soon as the last batch was handed out.
    """

    def __init__(self, *, is_eager: bool = False, has_length: bool = True) -> None:
        self.at, self.passes, self._is_eager = 0, 0, is_eager
        self._is_put_back = False
        self.has_length = has_length

    def __len__(self) -> int:
        if not self.has_length:
            raise TypeError("no length")
        return 4

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.rand(())  # as torch's own does for its processes' seeds
        return self._batches()

    def _batches(self) -> Iterator[torch.Tensor]:
        if not self._is_put_back:
            self.at = 0
        self._is_put_back = False
        while self.at < 4:
            self.at += 1
            number = 10 * self.passes + self.at
            if self._is_eager and self.at == 4:
                self.at, self.passes = 0, self.passes + 1
                yield torch.tensor([number])
                return
            yield torch.tensor([number])
        self.at, self.passes = 0, self.passes + 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "passes": self.passes, "tensor": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.passes, self._is_put_back = state["at"], state["passes"], True


@pytest.mark.parametrize(("is_eager", "has_length"), [(False, True), (True, True), (False, False)])
def test_loaders_of_ones_own(base: Path, is_eager: bool, has_length: bool) -> None:
    whole = check_every_interruption(base, lambda: Own(is_eager=is_eager, has_length=has_length))
    assert [samples_of(whole, epoch) for epoch in (0, 1, 2)] == [
        [10 * epoch + index for index in (1, 2, 3, 4)] for epoch in (0, 1, 2)
    ]


def test_another_kind_of_loader_is_refused(base: Path) -> None:
    read(base / "x.r.00000", Own(), epochs=1, stop_after=2)
    loader = DataLoader(Squares(4), batch_size=1)
    with pytest.raises(SweeperError, match="another kind of data loader"):
        read(base / "x.r.00000", loader, epochs=1)
