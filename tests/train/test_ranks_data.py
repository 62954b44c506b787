"""Data on several ranks: each rank goes on with its own, and no sample is seen twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
from alone import flat, samples_of
from crash import mini
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SubsetRandomSampler

from sweeper.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    mini.warm_up()


@pytest.fixture
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path


def check_interrupted(base: Path, make: Callable[[int], Any], *, at: int, epochs: int = 2) -> list[Any]:
    """Stopped after a batch and gone on: together what an undisturbed training sees, on each rank."""
    whole = forked_ranks.read(base / "whole.r.00000", 2, make, epochs=epochs)
    first = forked_ranks.read(base / "stopped.r.00000", 2, make, epochs=epochs, stop_after=at)
    rest = forked_ranks.read(base / "stopped.r.00000", 2, make, epochs=epochs)
    for rank in (0, 1):
        assert first[rank] + rest[rank] == whole[rank], f"rank {rank}"
    return whole


# --- data that knows its position itself -----------------------------------------------------


class Shard(IterableDataset):
    """A list of one rank's own."""

    def __init__(self, rank: int) -> None:
        self.numbers = list(range(100 * rank, 100 * rank + 6))
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < len(self.numbers):
            self.next += 1
            yield self.numbers[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.numbers, self.next = state["numbers"], state["next"]


@pytest.mark.parametrize("at", [2, 3])
def test_each_rank_goes_on_with_its_own_stream(base: Path, at: int) -> None:
    whole = check_interrupted(base, lambda rank: DataLoader(Shard(rank), batch_size=2), at=at)
    assert [batch for epoch, batch, _ in whole[1] if epoch == 0] == [[100, 101], [102, 103], [104, 105]]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_stream_is_refused_on_another_number_of_ranks(base: Path, before: int, after: int) -> None:
    def make(rank: int) -> DataLoader[Any]:
        return DataLoader(Shard(rank), batch_size=2)

    forked_ranks.read(base / "x.r.00000", before, make, epochs=2, stop_after=2)
    with pytest.raises(
        ConfigError, match=f"made by {before} ranks, these are {after}: the position of"
    ) as caught:
        forked_ranks.read(base / "x.r.00000", after, make, epochs=2)
    assert caught.value.exit_code == 78


# --- samplers --------------------------------------------------------------------------------


class Numbers(Dataset):
    """Sample i is i."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        return index


class Buckets(Sampler[list[int]]):
    """Batches of uneven sizes, in another order each epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1, 2], [3], *([index, index + 1] for index in range(4, 22, 2)), [22]]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return 12


class Kept(Sampler[int]):
    """Begins each epoch where the one before it ended."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        self.start += 5
        return iter([(self.start + index) % 23 for index in range(23)])

    def __len__(self) -> int:
        return 23

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "subset": lambda: DataLoader(Numbers(), sampler=SubsetRandomSampler(range(23)), batch_size=2),
    "drop-last": lambda: DataLoader(Numbers(), sampler=SubsetRandomSampler(range(23)), batch_size=2, drop_last=True),
    "buckets": lambda: DataLoader(Numbers(), batch_sampler=Buckets()),
    "kept": lambda: DataLoader(Numbers(), sampler=Kept(), batch_size=2),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_what_a_sampler_draws_is_shared_out(base: Path, name: str) -> None:
    whole = check_interrupted(base, lambda rank: LOADERS[name](), at=3)
    for epoch in (0, 1):
        seen = [number for rank in whole for number in samples_of(rank, epoch)]
        assert len(seen) == len(set(seen)) == (20 if name == "drop-last" else 23)
    if name == "buckets":
        assert {len(flat(batch)) for rank in whole for _, batch, _ in rank} == {1, 2, 3}


@pytest.mark.parametrize("name", ["subset", "buckets", "kept"])
@pytest.mark.parametrize("change", [(2, 1), (1, 2), (2, 3)])
def test_what_a_sampler_draws_is_shared_out_anew(base: Path, name: str, change: tuple[int, int]) -> None:
    before, after = change
    first = forked_ranks.read(
        base / "x.r.00000", before, lambda rank: LOADERS[name](), epochs=2, stop_after=3
    )
    rest = forked_ranks.read(base / "x.r.00000", after, lambda rank: LOADERS[name](), epochs=2)
    for epoch in (0, 1):
        seen = [number for rank in (*first, *rest) for number in samples_of(rank, epoch)]
        assert sorted(seen) == list(range(23))


def test_a_list_that_is_not_the_same_on_all_ranks_is_refused(base: Path) -> None:
    def make(rank: int) -> DataLoader[Any]:
        return DataLoader(Numbers(), sampler=SubsetRandomSampler(range(rank, 20 + rank)), batch_size=2)

    with pytest.raises(ConfigError, match="SubsetRandomSampler draws other samples on rank 0 than elsewhere"):
        forked_ranks.read(base / "x.r.00000", 2, make, epochs=1)


def test_single_items_cannot_be_shared_out(base: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=None cannot be shared out"):
        forked_ranks.read(
            base / "x.r.00000", 2, lambda rank: DataLoader(Numbers(), batch_size=None), epochs=1
        )


@pytest.mark.parametrize("change", [(1, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_plain_loader_is_shared_out_anew(base: Path, change: tuple[int, int], stop_after: int) -> None:
    before, after = change

    def make(rank: int) -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_size=2, shuffle=True)

    first = forked_ranks.read(base / "x.r.00000", before, make, epochs=2, stop_after=stop_after)
    rest = forked_ranks.read(base / "x.r.00000", after, make, epochs=2)
    for epoch in (0, 1):
        seen = [number for rank in (*first, *rest) for number in samples_of(rank, epoch)]
        assert sorted(seen) == list(range(23))
