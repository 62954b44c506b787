"""Several ranks as one: what rank 0 decides, all do at the same step boundary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from sweeper.errors import ConfigError


class Kind(Enum):
    """Why a checkpoint is not used."""

    DAMAGED = "damaged"
    UNFIT = "of another training"
    NO_MEMORY = "too big"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rank does not use a checkpoint; all hear of it, and draw the same conclusion."""

    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the ranks of a training; alone when torch.distributed is not initialised.

    Attributes:
        rank, world_size: As in torch.
        group: A gloo group for decisions, which are objects on the host, beside whatever backend
            the training uses.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @classmethod
    def here(cls, *, wait_s: float) -> Ranks:
        """Collective: all ranks must call it. A rank that does not come within `wait_s` is an error."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s)),
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank decides, and talks to the worker."""
        return self.rank == 0

    def from_first(self, value: Any, *, at: str) -> Any:
        """What rank 0 has. Collective.

        Args:
            at: Where this rank is, in words; rank 0 must be there, too.

        Raises:
            ConfigError: It is somewhere else.
        """
        if self.world_size == 1:
            return value
        box = [(at, value)]
        dist.broadcast_object_list(box, src=0, group=self.group)
        first_at, value = box[0]
        if first_at != at:
            raise ConfigError(
                f"rank 0 is {first_at}, rank {self.rank} {at}",
                why="they have left the loop at different steps",
                do="Leave it by what is the same on all ranks (torch.distributed.all_reduce).",
            )
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What each rank has, on rank 0; elsewhere an empty list. Collective."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, box, dst=0, group=self.group)
        return box or []

    def everywhere(self, value: Any) -> list[Any]:
        """What each rank has, on all of them. Collective."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def agreed(self, refusal: Refusal | None) -> Refusal | None:
        """The first refusal any rank has, on all of them; None when there is none. Collective."""
        if self.world_size == 1:
            return refusal
        for rank, found in enumerate(self.everywhere(refusal)):
            if isinstance(found, Refusal):
                return found if rank == 0 else replace(found, text=f"rank {rank}: {found.text}")
        return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel, so that a checkpoint has plain names."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def rank_files(name: str, world_size: int) -> Iterator[str]:
    """A file's name on each rank: `rng_state.pt`, `rng_state.rank1.pt`, …."""
    return (rank_file(name, rank) for rank in range(world_size))


def rank_file(name: str, rank: int) -> str:
    """A file's name on one rank."""
    stem, _, suffix = name.rpartition(".")
    return name if rank == 0 else f"{stem}.rank{rank}.{suffix}"
