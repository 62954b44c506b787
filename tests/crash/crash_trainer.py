"""A small training that behaves badly on request; real workers import it by name."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper.torch import resumable


def train(cfg: Any, run: Any) -> float:
    """Twenty-four steps; the first attempt misbehaves at step `cfg.at` and is slow from there on.

    Slow until the file `go` is in the data directory, so that a test has all the time it needs.
    """
    torch.manual_seed(run.seed)
    x = torch.arange(24, dtype=torch.float32).reshape(12, 2) / 24
    loader = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.25), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    go = run.directory.parents[3] / "go"
    for (inputs,) in loop.batches(epochs=8):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean() * (1 + random.random())
        loss.backward()
        optimizer.step()
        loop.report(train_loss=loss.item())
        if run.spec.attempt == 1 and loop.step >= cfg.at:
            misbehave(str(cfg.act), go)
    model.eval()
    with torch.no_grad():
        return (model(x) - x.sum(1, keepdim=True)).pow(2).mean().item()


def misbehave(act: str, go: Path) -> None:
    """What can go wrong with a trainer."""
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "segv":
        ctypes.string_at(0)
    elif act == "memory":
        raise MemoryError("no room for 7 exabytes")
    elif act == "raise":
        raise ValueError("the loss is on fire")
    elif act == "exit":
        os._exit(3)
    elif act == "hang":
        time.sleep(3600)
    elif act == "daemon":
        if not (noted := go.with_name("daemon")).exists():
            noted.write_text(str(subprocess.Popen(["sleep", "3600"], start_new_session=True).pid))
        time.sleep(0.2)
    elif act == "slow" and not go.exists():
        time.sleep(0.2)
