"""What a paced step really takes, without checkpoints and without failures.

Usage: floor_pace.py STEPS
"""

from __future__ import annotations

import sys
import time

from bench import workload
from bench.crowd import answer

if __name__ == "__main__":
    model = workload.network()
    optimizer = workload.optimizer_of(model)
    batches = workload.batches()
    for number in range(20):
        workload.paced_step(model, optimizer, next(batches), number)
    steps = int(sys.argv[1])
    started = time.monotonic()
    for number in range(steps):
        workload.paced_step(model, optimizer, next(batches), number)
    answer({"step_s": (time.monotonic() - started) / steps})
