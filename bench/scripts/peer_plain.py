"""Peer: a plain training loop with a careful checkpoint each EVERY steps, started again when it dies.

Usage: peer_plain.py DIRECTORY EVERY
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import workload

if __name__ == "__main__":
    checkpoint, every = Path(sys.argv[1]) / "plain.pt", int(sys.argv[2])
    workload.mark("start")
    model = workload.network()
    optimizer = workload.optimizer_of(model)
    done = workload.load(checkpoint, model=model, optimizer=optimizer)
    for number, batch in enumerate(workload.batches(), start=done + 1):
        workload.paced_step(model, optimizer, batch, number)
        if number % every == 0:
            workload.save(checkpoint, step=number, model=model, optimizer=optimizer)
