"""The same trainings as a user of sweeper writes them; named by `trainer._target_` in bench/conf."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from bench import workload
from sweeper.torch import resumable


def tiny(cfg: Any, run: Any) -> float:
    """A few steps and nothing else: what all peers run in row 1."""
    return workload.tiny(cfg.lr, cfg.width)


def tiny_resumable(cfg: Any, run: Any) -> float:
    """The same few steps, resumable: with the checkpoint of the last step that sweeper promises."""
    workload.mark("start")
    model = workload.network(cfg.width)
    optimizer = workload.optimizer_of(model, cfg.lr)
    loader = DataLoader(workload.samples(), batch_size=workload.BATCH, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    loss = 0.0
    for batch in loop.batches(epochs=1, max_steps=4):
        loss = workload.step(model, optimizer, batch)
    workload.mark("end", loop.step)
    return loss


def long(cfg: Any, run: Any) -> float:
    """Paced steps for hours: what is killed in rows 5 to 7."""
    model = workload.network(cfg.width)
    optimizer = workload.optimizer_of(model, cfg.lr)
    loader = DataLoader(workload.samples(), batch_size=workload.BATCH, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    loss = 0.0
    for batch in loop.batches(epochs=1_000_000):
        loss = workload.paced_step(model, optimizer, batch, loop.step)
        if loop.step % 10 == 0:
            loop.report(loss=loss)
    return loss


def logged(cfg: Any, run: Any) -> float:
    """Steps without a pause, each of them logged: row 12."""
    model = workload.network(cfg.width)
    optimizer = workload.optimizer_of(model, cfg.lr)
    loader = DataLoader(workload.samples(), batch_size=workload.BATCH, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    loss = 0.0
    workload.mark("start")
    for batch in loop.batches(epochs=1_000_000, max_steps=cfg.steps):
        loss = workload.step(model, optimizer, batch)
        loop.report(loss=loss)
    workload.mark("end", loop.step)
    return loss


def large(cfg: Any, run: Any) -> float:
    """A large state, saved often: row 8 reads from the trace how long the loop stood still."""
    model, optimizer = workload.large(cfg.size_mb)
    data = torch.utils.data.TensorDataset(torch.zeros(cfg.steps, 1))
    loop = resumable(run, model=model, optimizer=optimizer, loader=DataLoader(data))
    for _ in loop.batches(epochs=1):
        workload.mark("begin", loop.step)
        workload.large_step(model, optimizer)
        time.sleep(cfg.pause_s)
        workload.mark("end", loop.step)
    return 0.0
