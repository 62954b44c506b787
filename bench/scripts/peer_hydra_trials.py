"""Peer: Hydra multirun; launcher and sweeper come from the command line.

Usage: peer_hydra_trials.py -m hydra/launcher=submitit_local lr=range(…) … (any Hydra override)
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None)
def trial(cfg: DictConfig) -> float:
    """One trial."""
    from bench import workload

    return workload.tiny()


if __name__ == "__main__":
    trial()
