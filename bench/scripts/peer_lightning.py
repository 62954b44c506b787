"""Peer: PyTorch Lightning with a checkpoint each EVERY steps, resumed from its newest one.

The bench starts it again when it dies.

Usage: peer_lightning.py DIRECTORY EVERY
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from bench import workload

workload.mark("start")

import pytorch_lightning as lightning  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning.callbacks import Callback, ModelCheckpoint  # noqa: E402

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    """The network as a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.network = workload.network()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return workload.optimizer_of(self.network)


class Pace(Callback):
    """Each step takes STEP_S from its start to its end and is traced."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        workload.pace(self.started)
        workload.mark("step", trainer.global_step)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) / "lightning"
    every = int(sys.argv[2])
    saver = ModelCheckpoint(
        dirpath=directory,
        filename="{step}",
        every_n_train_steps=every,
        save_top_k=2,
        monitor="step",
        mode="max",
    )
    saved = sorted(directory.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Pace(), saver],
        default_root_dir=str(directory),
    )
    data = torch.utils.data.DataLoader(workload.samples(), batch_size=workload.BATCH, shuffle=True)
    trainer.fit(Module(), data, ckpt_path=str(saved[-1]) if saved else None)
