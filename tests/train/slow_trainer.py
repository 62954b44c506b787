"""A tiny training with dropout and shuffling that takes its time, so that it can be interrupted."""

import os
import signal
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from sweeper.torch import resumable


def train(cfg, run):
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    loader = DataLoader(TensorDataset(data), batch_size=8, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    for (batch,) in loop.batches(epochs=8):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        loop.report(loss=loss)
        if run.start_step == 0 and loop.step == 20 and os.environ.get("SLOW_END"):
            end(os.environ["SLOW_END"])
        time.sleep(0.03)
    return loss


def end(how):
    """End in the middle of an attempt that started from step 0."""
    if how == "raise":
        raise RuntimeError("on purpose")
    if how == "memory":
        raise MemoryError("on purpose")
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.Signals[how])
