"""Data on several ranks: each rank goes on with its own, and no sample is seen twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
from crash import mini
from torch.utils.data import DataLoader, IterableDataset

from sweeper.errors import ConfigError


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
