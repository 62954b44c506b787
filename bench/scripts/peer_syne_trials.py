"""Peer: Syne Tune's local backend, many tiny trials, two at a time. Also the script of each trial.

Usage: peer_syne_trials.py DIRECTORY TRIALS
"""

from __future__ import annotations

import argparse
import os
import sys


def tune(directory: str, trials: int) -> None:
    """Run the tuner; it polls each 50 ms instead of its default of 5 s."""
    os.environ["SYNETUNE_FOLDER"] = directory
    from syne_tune import StoppingCriterion, Tuner
    from syne_tune.backend import LocalBackend
    from syne_tune.config_space import loguniform
    from syne_tune.optimizer.baselines import RandomSearch

    space = {"lr": loguniform(1e-4, 1e-1)}
    Tuner(
        trial_backend=LocalBackend(entry_point=__file__),
        scheduler=RandomSearch(space, metrics=["loss"], do_minimize=True),
        stop_criterion=StoppingCriterion(max_num_trials_finished=trials),
        n_workers=2,
        sleep_time=0.05,
        save_tuner=False,
        tuner_name="bench",
    ).run()


def trial() -> None:
    """One trial, in a process of its own."""
    from syne_tune import Reporter

    from bench import workload

    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    Reporter()(loss=workload.tiny(parser.parse_known_args()[0].lr))


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        trial()
    else:
        tune(sys.argv[1], int(sys.argv[2]))
