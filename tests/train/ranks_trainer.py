"""A training on several ranks that notes which samples it saw; torchrun's ranks import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from sweeper.errors import ConfigError
from sweeper.torch import resumable

SIZE = 50
BATCH = 4


class Numbered(Dataset):
    """Samples that say who they are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = torch.tensor([index / SIZE, (index * 7 % SIZE) / SIZE])
        return x, x.sum().reshape(1), index


def train(cfg: Any, run: Any) -> float:
    """Dropout, shuffling, AdamW; in the first attempt rank `cfg.rank` does `cfg.act` at step `cfg.at`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = wrapped(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1)), cfg.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    loader = DataLoader(Numbered(), batch_size=BATCH, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    loss = torch.zeros(())
    for inputs, targets, indices in loop.batches(epochs=cfg.epochs):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with open(run.directory / f"seen.{run.spec.attempt}.{rank}.txt", "a") as seen:
            print(loop.epoch, loop.step, *indices.tolist(), file=seen, flush=True)
        time.sleep(float(os.environ.get("PACE_S", "0")))
        loop.report(train_loss=loss.item())
        if run.spec.attempt <= cfg.attempts and loop.step >= cfg.at * run.spec.attempt and rank == cfg.rank:
            misbehave(cfg.act)
    return loss.item()


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if not dist.is_initialized():
        return model
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model
    return DistributedDataParallel(model)


def worker_pid() -> int:
    """The worker above this trainer: server, and torchrun's agent, lie between."""
    pid = os.getpid()
    while b"\0worker\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def misbehave(act: str) -> None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "kill the worker":
        os.kill(worker_pid(), signal.SIGKILL)
        time.sleep(60)
    elif act == "raise":
        raise ValueError("this rank has had enough")
    elif act == "memory":
        raise MemoryError("no room on this rank")
    elif act == "misconfigure":
        raise ConfigError("this rank was set up wrong", do="Set it up right.")
    elif act == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif act == "hang":
        time.sleep(3600)
