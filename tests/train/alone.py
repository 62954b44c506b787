"""A run with nobody behind it, and a data set read through it with interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from sweeper import rundir
from sweeper.channel import Message
from sweeper.torch import Preempted, Run, resumable
from sweeper.trainer.main import prepare_process
from sweeper.trainer.run import Spec


class Alone:
    """A link with nobody behind it; remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Message]] = []
        self.stop_reason: str | None = None

    def poll(self) -> None:
        pass

    def tell(self, kind: str, **data: Any) -> None:
        self.told.append((kind, data))

    def ask(self, kind: str, **data: Any) -> Message:
        return {}

    def said(self, kind: str) -> list[Message]:
        return [data for told, data in self.told if told == kind]


def new_run(directory: Path, *, checkpoint: dict[str, Any] | None = None, **more: Any) -> Run:
    """The next attempt of a run in `directory`."""
    for name in (rundir.CHECKPOINTS_DIR, rundir.LOGS_DIR):
        (directory / name).mkdir(parents=True, exist_ok=True)
    epoch = rundir.largest_epoch(directory) + 1
    spec = Spec(**{
        "run_dir": str(directory), "run_id": directory.name, "sweep": "alone", "trial": 0, "params": {}, "seed": 3,
        "threads": 1, "attempt": epoch, "lease_epoch": epoch, "config_digest": "", "deadline_s": float("inf"),
        "metric": "loss", "direction": "minimize", "has_pruner": False, "was_committed": False,
        "checkpoint": checkpoint or {}, **more,
    })  # fmt: skip
    return Run(spec, Alone(), config=OmegaConf.create({"trainer": {"lr": 0.1}}))


Seen = list[tuple[int, Any, float]]


def read(directory: Path, loader: Any, *, epochs: int, stop_after: int | None = None) -> Seen:
    """Read through a loop; asked to stop after so many batches. Returns (epoch, batch, a random number) of each."""
    run = new_run(directory)
    prepare_process(run.spec)
    loop = resumable(run, model=nn.Linear(1, 1, bias=False), loader=loader)
    seen: Seen = []
    try:
        for batch in loop.batches(epochs=epochs):
            seen.append((loop.epoch, plain(batch), torch.rand(()).item()))
            if len(seen) == stop_after:
                run._link.stop_reason = "asked to"  # type: ignore[misc]
    except Preempted:
        return seen
    run.finish()
    return seen


def plain(batch: Any) -> Any:
    """Numbers and lists instead of tensors."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(item) for item in batch] if isinstance(batch, list | tuple) else batch


def flat(batch: Any) -> list[Any]:
    """All numbers of a batch."""
    return [number for item in batch for number in flat(item)] if isinstance(batch, list) else [batch]


def check_every_interruption(
    base: Path, make: Callable[[], Any], *, epochs: int = 3, at: Iterable[int] | None = None
) -> Seen:
    """Stop after any batch, go on in another attempt: both together see what one attempt sees."""
    whole = read(base / "whole.r.00000", make(), epochs=epochs)
    for number in at or range(1, len(whole) + 1):
        first = read(base / f"stopped.r.{number:05}", make(), epochs=epochs, stop_after=number)
        rest = read(base / f"stopped.r.{number:05}", make(), epochs=epochs)
        assert first + rest == whole, f"stopped after batch {number}"
    return whole


def samples_of(seen: Seen, epoch: int) -> list[Any]:
    """All samples of an epoch in the order they came."""
    return [number for at, batch, _ in seen if at == epoch for number in flat(batch)]
