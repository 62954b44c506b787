"""A small real training that goes no further than the test lets it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper.torch import resumable

STEPS_PER_EPOCH = 10


def train(cfg, run):
    gate = Path(os.environ["GATE"])
    is_gated = run.spec.trial >= int(os.environ.get("GATED_FROM", "0"))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    loss = torch.zeros(())
    for inputs, targets in loop.batches(epochs=cfg.epochs):
        while is_gated and int(gate.read_text()) < loop.step:
            time.sleep(0.01)
            run.progress()
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.report(train_loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
    return loss.item()
