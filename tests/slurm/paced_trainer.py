"""The reference trainer at a pace at which things can happen to it; tells when a run is executed by two at once."""

import fcntl
import os
import time
from pathlib import Path

from sweeper_train import digits

from sweeper.torch import Loop


def train(cfg, run):
    report = Loop.report

    def slow(loop, **values):
        time.sleep(float(os.environ.get("PACE_S", "0")))
        report(loop, **values)

    Loop.report = slow
    watched = Path(os.environ["WATCHED_DIR"])
    with open(watched / f"{run.run_id}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (watched / "violations").open("a").write(f"{run.run_id}\n")
        return digits.train(cfg, run)
