"""The training that everybody runs: a small network on fixed data, and a trace of what happened when.

Shared by sweeper and its peers, so it knows none of them. The trace is one text line per event,
`<monotonic seconds> <pid> <event> <step>`: the monotonic clock is one for all processes of a machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

SAMPLES, FEATURES, CLASSES, BATCH = 512, 64, 10, 64
STEP_S = 0.010
"""What one paced step takes: compute first, then sleep for the rest, as beside an accelerator."""


def mark(event: str, step: int = 0) -> None:
    """Append one event to the trace (BENCH_TRACE); one write call, so that lines never mix."""
    if path := os.environ.get("BENCH_TRACE"):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{time.monotonic():.6f} {os.getpid()} {event} {step}\n".encode())
        os.close(fd)


def network(width: int = 64) -> nn.Module:
    """The model: 64 features → width → 10 classes, the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def samples() -> torch.utils.data.TensorDataset:
    """The data: noise that never changes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


def optimizer_of(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """What trains the model."""
    return torch.optim.AdamW(model.parameters(), lr=lr)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> float:
    """One update of the weights; returns the loss."""
    inputs, labels = batch
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def paced_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor], number: int
) -> float:
    """One update that takes STEP_S in all, traced as step `number` when done."""
    started = time.monotonic()
    loss = step(model, optimizer, batch)
    pace(started)
    mark("step", number)
    return loss


def pace(started: float) -> None:
    """Sleep until STEP_S after `started`."""
    time.sleep(max(0.0, started + STEP_S - time.monotonic()))


def batches() -> Iterator[list[torch.Tensor]]:
    """Batches for ever."""
    loader = torch.utils.data.DataLoader(samples(), batch_size=BATCH, shuffle=True)
    while True:
        yield from loader


def tiny(lr: float = 1e-3, width: int = 64, steps: int = 4) -> float:
    """A whole training of a few steps, the same for everybody: what a trial costs beyond it is overhead."""
    mark("start")
    model = network(width)
    optimizer = optimizer_of(model, lr)
    loss = 0.0
    for _, batch in zip(range(steps), batches(), strict=False):
        loss = step(model, optimizer, batch)
    mark("end", steps)
    return loss


# --- a checkpoint of the plain kind ---------------------------------------------------------


def save(path: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """torch.save, fsync, rename, fsync of the directory: what a careful script does."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fd = os.open(path.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def load(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save` wrote; returns the step, 0 when there is nothing."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


# --- 300 MB of it ---------------------------------------------------------------------------


def large(size_mb: int = 300) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an AdamW that hold `size_mb` together, one third weights, state filled."""
    torch.manual_seed(0)
    layers = 8
    width = int((size_mb * 1e6 / 12 / layers) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    large_step(model, optimizer)
    return model, optimizer


def large_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One real update of the large model."""
    width = model[0].in_features  # type: ignore[index]
    loss = model(torch.randn(4, width)).square().mean()
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
