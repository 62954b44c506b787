"""What a sampler of the user's draws, made a function of (seed, epoch) and of the sampler's own state."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from sweeper.errors import ConfigError


def derived_seed(seed: int, *words: object) -> int:
    """A 63-bit seed from a seed and words: independent streams from one number."""
    text = ":".join(map(str, (seed, *words)))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch's CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Drawing:
    """A sampler, or batch sampler, and what it has drawn for the epoch in progress.

    `set_epoch` is called where there is one; a `generator` of its own is seeded, and so are the
    global ones, which get their states back. What it keeps from one epoch to the next is saved if it
    has `state_dict` and `load_state_dict`: as of the start of the epoch, from where the epoch is drawn
    again, and as of now, if the training has changed it since.

    Raises:
        ConfigError: It has no length, or leaves a part of the data to other ranks.
    """

    def __init__(self, sampler: Any, *, seed: int) -> None:
        self.sampler, self._seed = sampler, seed
        inner = getattr(sampler, "sampler", None)
        self._samplers = [sampler] if inner is None else [sampler, inner]
        self._keeper = next((each for each in self._samplers if has_state(each)), None)
        self._at_start: Any = None
        self._when_drawn: Any = None
        self._restored: Mapping[str, Any] | None = None
        for each in self._samplers:
            if getattr(each, "num_replicas", 1) > 1:
                raise ConfigError(
                    f"the sampler {type(each).__name__} leaves a part of the data to other ranks",
                    do="Pass the loader without it: the loop shares each step's samples out among the ranks.",
                )
        if length_of(sampler) is None:
            raise ConfigError(
                f"the loader's sampler {self.name} has no length",
                do="Give it a __len__, or pass a DataLoader with batch_size and shuffle.",
            )

    @property
    def name(self) -> str:
        """For people."""
        return type(self._samplers[-1]).__name__

    def __len__(self) -> int:
        return len(self.sampler)

    def draw(self, epoch: int) -> list[Any]:
        """All it gives in an epoch.

        Raises:
            ConfigError: That is not as much as it says.
        """
        restored, self._restored = self._restored, None
        seed = derived_seed(self._seed, "order", epoch)
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        with generators_kept():
            seed_generators(seed)
            if self._keeper is not None:
                if restored is not None:
                    self._keeper.load_state_dict(copy.deepcopy(restored["start"]))
                self._at_start = copy.deepcopy(self._keeper.state_dict())
            drawn = list(self.sampler)
        if len(drawn) != len(self):
            raise ConfigError(
                f"the sampler {type(self.sampler).__name__} says it has length {len(self)}, and gave {len(drawn)}",
                do="Its __len__ must be right in every epoch.",
            )
        if self._keeper is not None:
            self._when_drawn = copy.deepcopy(self._keeper.state_dict())
            if restored is not None and "now" in restored:
                self._keeper.load_state_dict(copy.deepcopy(restored["now"]))
        return drawn

    def state_dict(self, *, is_between: bool) -> dict[str, Any]:
        """What a resume needs; empty if the sampler keeps nothing.

        Args:
            is_between: The next epoch has not begun.
        """
        if self._keeper is None:
            return {}
        now = self._keeper.state_dict()
        if is_between:
            return {"start": now}
        return {"start": self._at_start, **({} if _is_same(now, self._when_drawn) else {"now": now})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next epoch is drawn from there."""
        self._restored = state


def has_state(thing: Any) -> bool:
    """Whether it can say and take its state."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def length_of(thing: Any) -> int | None:
    """Its length; None if it has none."""
    try:
        return len(thing)
    except TypeError:
        return None


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and bool(one == other)
