"""Peer: Ray Tune with one long trial, a checkpoint each EVERY steps, any number of failures allowed.

Started again after everything died, it restores the experiment.
Usage: peer_ray_long.py DIRECTORY EVERY
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ray
from ray import tune

from bench import workload


def train(config: dict[str, int]) -> None:
    """One long trial."""
    model = workload.network()
    optimizer = workload.optimizer_of(model)
    done = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            done = workload.load(Path(directory) / "plain.pt", model=model, optimizer=optimizer)
    for number, batch in enumerate(workload.batches(), start=done + 1):
        loss = workload.paced_step(model, optimizer, batch, number)
        if number % config["every"] == 0:
            with tempfile.TemporaryDirectory() as directory:
                workload.save(Path(directory) / "plain.pt", step=number, model=model, optimizer=optimizer)
                tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(directory))


def tuner(directory: str, every: int) -> tune.Tuner:
    """A new experiment, or the one that was interrupted."""
    trainable = tune.with_resources(train, {"cpu": 1})
    path = f"{directory}/results/bench"
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space={"every": every},
        tune_config=tune.TuneConfig(num_samples=1),
        run_config=tune.RunConfig(
            name="bench",
            storage_path=f"{directory}/results",
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            verbose=0,
        ),
    )


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1")
    tuner(sys.argv[1], int(sys.argv[2])).fit()
