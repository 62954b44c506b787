"""Peer: Optuna's ask + tell, three parameters, random sampler, on SQLite or on a journal file.

Usage: peer_optuna_asks.py DIRECTORY WORKERS TRIALS LIMIT_S sqlite|journal
"""

from __future__ import annotations

import sys

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from bench.crowd import Act, answer, crowd

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "width": optuna.distributions.CategoricalDistribution([32, 64, 128]),
    "dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
}


def open_storage(directory: str, kind: str) -> BaseStorage:
    """SQLite as Optuna opens it, or its journal file."""
    if kind == "journal":
        return JournalStorage(JournalFileBackend(f"{directory}/journal.log"))
    arguments = {"connect_args": {"timeout": 60}}
    return RDBStorage(f"sqlite:///{directory}/optuna.db", engine_kwargs=arguments)


def client(directory: str, kind: str) -> Act:
    """One ask + tell."""
    sampler = optuna.samplers.RandomSampler()
    study = optuna.load_study(study_name="bench", storage=open_storage(directory, kind), sampler=sampler)

    def act() -> None:
        trial = study.ask(SPACE)
        study.tell(trial, trial.params["lr"])

    return act


if __name__ == "__main__":
    directory, kind = sys.argv[1], sys.argv[5]
    optuna.create_study(study_name="bench", storage=open_storage(directory, kind))
    answer(
        crowd(
            workers=int(sys.argv[2]),
            acts=int(sys.argv[3]),
            limit_s=float(sys.argv[4]),
            connect=lambda: client(directory, kind),
        )
    )
