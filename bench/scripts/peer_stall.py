"""Peers: how long one save of a large state keeps the training loop waiting, and how long it takes in all.

Usage: peer_stall.py DIRECTORY SIZE_MB REPEATS plain|lightning|lightning_async|dcp_async|ray
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import workload
from bench.crowd import answer

Save = Callable[[int], Any]
"""Saves as number n; returns something with `.result()` when it goes on in the background."""


def plain(directory: Path, model: Any, optimizer: Any) -> Save:
    """torch.save, fsync, rename."""
    return lambda n: workload.save(directory / f"{n % 2}.pt", step=n, model=model, optimizer=optimizer)


def dcp_async(directory: Path, model: Any, optimizer: Any) -> Save:
    """torch.distributed.checkpoint's async_save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    def save(n: int) -> Any:
        weights, state = get_state_dict(model, optimizer)
        return dcp.async_save(
            {"model": weights, "optimizer": state}, checkpoint_id=str(directory / f"{n % 2}")
        )

    return save


def lightning(directory: Path, model: Any, optimizer: Any, *, background: bool = False) -> Save:
    """Trainer.save_checkpoint of a module that is being trained."""
    import pytorch_lightning
    from pytorch_lightning.plugins.io import AsyncCheckpointIO
    from torch.utils.data import DataLoader

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return optimizer

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        enable_checkpointing=False,
        default_root_dir=str(directory),
        plugins=[AsyncCheckpointIO()] if background else [],
        **quiet,
    )
    import torch

    trainer.fit(Module(), DataLoader(torch.randn(4, model[0].in_features), batch_size=4))
    return lambda n: trainer.save_checkpoint(str(directory / f"{n % 2}.ckpt"))


def ray_report(directory: Path, size_mb: int, repeats: int) -> list[float]:
    """torch.save into a directory that is handed to tune.report, timed inside the trial."""
    import ray
    from ray import tune

    def train(_: dict[str, int]) -> None:
        model, optimizer = workload.large(size_mb)

        def save(n: int) -> None:
            with tempfile.TemporaryDirectory(dir=directory) as place:
                workload.save(Path(place) / "plain.pt", step=n, model=model, optimizer=optimizer)
                tune.report({"loss": 0.0}, checkpoint=tune.Checkpoint.from_directory(place))

        seconds = stalls(model, optimizer, save, repeats, pause_s=1.0)
        Path(directory, "stalls").write_text(" ".join(map(str, seconds)))

    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=str(directory), _node_ip_address="127.0.0.1")
    config = tune.RunConfig(
        name="bench",
        storage_path=f"{directory}/results",
        checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        verbose=0,
    )
    tune.Tuner(tune.with_resources(train, {"cpu": 1}), run_config=config).fit()
    ray.shutdown()
    return [float(word) for word in Path(directory, "stalls").read_text().split()]


totals_s: list[float] = []


def stalls(model: Any, optimizer: Any, save: Save, repeats: int, *, pause_s: float) -> list[float]:
    """Seconds that each save kept the loop waiting; the first one, which warms buffers, is not counted."""
    seconds = []
    for n in range(repeats + 1):
        workload.large_step(model, optimizer)
        started = time.monotonic()
        pending = save(n)
        seconds.append(time.monotonic() - started)
        if hasattr(pending, "result"):
            pending.result()
        totals_s.append(time.monotonic() - started)
        time.sleep(pause_s)
    return seconds[1:]


if __name__ == "__main__":
    directory, size_mb, repeats, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if kind == "ray":
        answer({"stall_s": ray_report(directory, size_mb, repeats)})
        sys.exit()
    model, optimizer = workload.large(size_mb)
    makers: dict[str, Callable[..., Save]] = {
        "plain": plain,
        "dcp_async": dcp_async,
        "lightning": lightning,
        "lightning_async": lambda *state: lightning(*state, background=True),
    }
    save = makers[kind](directory, model, optimizer)
    pause_s = 3.0 if kind == "lightning_async" else 0.1
    stall_s = stalls(model, optimizer, save, repeats, pause_s=pause_s)
    answer({"stall_s": stall_s, "total_s": totals_s[1:]})
