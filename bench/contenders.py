"""One way to run a training: what to start, and whether it looks after its own trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Contender:
    """A program that is measured, ours or a peer.

    Attributes:
        argv: Scratch directory → command line. The same command continues what it finds there.
        is_supervised: It restarts a killed trainer by itself; else the bench starts the command again.
        env: More environment variables.
    """

    name: str
    argv: Callable[[Path], list[str]]
    is_supervised: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
