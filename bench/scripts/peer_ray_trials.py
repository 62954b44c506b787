"""Peer: Ray Tune, many tiny trials, two at a time.

Usage: peer_ray_trials.py DIRECTORY TRIALS reuse|fresh
"""

from __future__ import annotations

import sys

import ray
from ray import tune

from bench import workload


def train(config: dict[str, float]) -> None:
    """One trial."""
    tune.report({"loss": workload.tiny(config["lr"])})


if __name__ == "__main__":
    directory, trials, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=directory, _node_ip_address="127.0.0.1")
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-1)},
        tune_config=tune.TuneConfig(
            num_samples=trials, max_concurrent_trials=2, reuse_actors=mode == "reuse"
        ),
        run_config=tune.RunConfig(name="bench", storage_path=f"{directory}/results", verbose=0),
    )
    errors = tuner.fit().num_errors
    ray.shutdown()
    sys.exit(1 if errors else 0)
