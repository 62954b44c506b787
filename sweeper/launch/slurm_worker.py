"""What SLURM runs: submitit unpickles a `Worker` and calls it, again at each requeue.

SLURM runs the *original* pickle again, so it holds names only; all state comes from the database
and the run directories.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Worker:
    """Becomes a worker of `sweep`.

    Attributes:
        storage: The database's URL, without a password.
        threads: Threads of each trainer.
    """

    sweep: str
    storage: str
    data_dir: str
    threads: int

    def __call__(self) -> None:
        """Replace submitit's process: its signal handlers and its pickles have no part in a run."""
        from sweeper import processes
        from sweeper.slurm import worker_name

        environment = {
            **os.environ,
            "SWEEPER_STORAGE": self.storage,
            "SWEEPER_DATA_DIR": self.data_dir,
            "SWEEPER_THREADS": str(self.threads),
        }
        # HAZARD: without its step daemon SLURM would call the job over while we trained on. Lasts over exec.
        processes.die_with_parent(os.getppid(), by=signal.SIGTERM)
        sys.stdout.flush()
        sys.stderr.flush()
        argv = [sys.executable, "-m", "sweeper", "worker", self.sweep, "--name", worker_name()]
        os.execve(sys.executable, argv, environment)
