"""Peer: submitit's local executor, many tiny trials, two at a time, the next one as soon as one is done.

Usage: peer_submitit_trials.py DIRECTORY TRIALS
"""

from __future__ import annotations

import sys
import time

import submitit


def trial(lr: float) -> float:
    """One trial, in a process of its own."""
    from bench import workload

    return workload.tiny(lr)


if __name__ == "__main__":
    executor = submitit.AutoExecutor(folder=f"{sys.argv[1]}/logs", cluster="local")
    executor.update_parameters(timeout_min=5)
    waiting = int(sys.argv[2])
    running: list[submitit.Job[float]] = []
    while waiting or running:
        running = [job for job in running if not job.done()]
        while waiting and len(running) < 2:
            running.append(executor.submit(trial, 0.001))
            waiting -= 1
        time.sleep(0.005)
