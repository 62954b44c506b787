"""A training with a state large enough that a real saver saves it; real workers import it by name."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper.torch import resumable

STEPS = 20
WAITS_IN = 8


def train(cfg: Any, run: Any) -> float:
    """In its first attempt it waits in step 8 for the file `go` in the data directory."""
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(700, 700), nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    loader = DataLoader(TensorDataset(torch.rand(40, 700)), batch_size=2, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    go = run.directory.parents[3] / "go"
    for (inputs,) in loop.batches(epochs=1):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        loop.report(train_loss=loss)
        if loop.step > 1:
            loop._saves.wait()  # so that each save has begun and ended when the next is due
        while loop.step == WAITS_IN and run.spec.attempt == 1 and not go.exists():
            run.progress()
            time.sleep(0.01)
    return float(loss.item())
