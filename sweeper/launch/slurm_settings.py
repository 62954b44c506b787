"""The keys of launcher=slurm, checked before anything is made of them. What SLURM thinks of them it says itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sweeper.errors import ConfigError

EARLY_S = 60
"""SLURM warns up to so much earlier than it was asked to. Source: sbatch(1), --signal."""

_COUNTS = ("n_workers", "nodes", "tasks_per_node", "cpus_per_task", "array_parallelism", "signal_delay_s")
_COUNTS_OR_NULL = ("timeout_min",)
_TEXTS = ("partition", "account", "qos", "constraint", "gres")
NEEDED = (*_COUNTS, *_COUNTS_OR_NULL, *_TEXTS, "gpus_per_node", "mem_gb", "setup", "additional_parameters")

_OURS = {
    "job-name": "the sweep's workers are known by it: choose sweep.name",
    "array": "choose launcher.n_workers",
    "signal": "choose launcher.signal_delay_s",
    "nodes": "choose launcher.nodes",
    "ntasks": "choose launcher.tasks_per_node",
    "ntasks-per-node": "choose launcher.tasks_per_node",
    "tasks-per-node": "choose launcher.tasks_per_node",
    "cpus-per-task": "choose launcher.cpus_per_task",
    "time": "choose launcher.timeout_min",
    "output": "logs lie where sweeper looks for them",
    "error": "logs lie where sweeper looks for them",
    "open-mode": "a requeued job goes on in its log",
    "requeue": "jobs are always requeued",
    "no-requeue": "jobs are always requeued",
    "wrap": "the script is sweeper's",
}
"""Options of sbatch on which the rest depends."""


def check(launcher: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is of no use, naming its key."""
    for key in NEEDED:
        if key not in launcher:
            raise ConfigError(f"launcher.{key} is missing", do="Leave it as launcher=slurm has it.")
    for key in _COUNTS:
        _need(_is_count(launcher[key]), key, launcher[key], "Use a whole number, at least 1.")
    for key in _COUNTS_OR_NULL:
        value = launcher[key]
        _need(value is None or _is_count(value), key, value, "Use a whole number, at least 1, or null.")
    for key in _TEXTS:
        value = launcher[key]
        is_text = value is None or (type(value) in (str, int) and value != "")
        _need(is_text, key, value, "Use a text, or null.")
    for key in set(launcher) - {"setup", "additional_parameters"}:
        is_one = not isinstance(launcher[key], list | dict)
        _need(is_one, key, launcher[key], "Use one text; write several as sbatch has them: 'a,b'.")
    gpus, memory, setup = launcher["gpus_per_node"], launcher["mem_gb"], launcher["setup"]
    is_gpus = gpus is None or isinstance(gpus, str) or (type(gpus) is int and gpus >= 0)
    _need(is_gpus, "gpus_per_node", gpus, "Use a number of GPUs, or null.")
    is_memory = memory is None or (type(memory) in (int, float) and 1 <= memory * 1024 < math.inf)
    _need(is_memory, "mem_gb", memory, "Use a number of GB, at least 0.001, or null.")
    is_lines = setup is None or (isinstance(setup, list) and all(isinstance(line, str) for line in setup))
    _need(is_lines, "setup", setup, "Use a list of lines of shell: launcher.setup=['module load cuda'].")
    _check_time(launcher["timeout_min"], launcher["signal_delay_s"])
    additional(launcher["additional_parameters"])


def additional(options: object) -> dict[str, Any]:
    """`launcher.additional_parameters` by sbatch's names; lists become texts, what is false or null is left out.

    Raises:
        ConfigError: One is of no use, or must not be changed.
    """
    key = "additional_parameters"
    if options is None:
        return {}
    _need(isinstance(options, Mapping), key, options, f"Use launcher.{key}={{option: value}}.")
    assert isinstance(options, Mapping)
    found = {str(name).replace("_", "-"): value for name, value in options.items()}
    for name, value in found.items():
        # sbatch takes beginnings of names as well.
        if ours := [do for option, do in _OURS.items() if option.startswith(name)]:
            raise ConfigError(f"launcher.{key}.{name} cannot be set", do=f"{ours[0].capitalize()}.")
        items = value if isinstance(value, list) else [value]
        is_plain = all(item is None or isinstance(item, str | int | float) for item in items)
        _need(is_plain, f"{key}.{name}", value, "Use a text, a number, true, or a list of them.")
        if isinstance(value, list):
            found[name] = ",".join(map(str, value))
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _check_time(timeout_min: int | None, signal_delay_s: int) -> None:
    if timeout_min is not None and timeout_min * 60 <= signal_delay_s + EARLY_S:
        raise ConfigError(
            f"launcher.timeout_min={timeout_min} leaves no time to train",
            why=f"SLURM warns {signal_delay_s} s before it (launcher.signal_delay_s), and up to {EARLY_S} s earlier",
            do="Raise timeout_min, or lower signal_delay_s to what a save takes.",
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _need(is_good: bool, key: str, value: object, do: str) -> None:
    if not is_good:
        raise ConfigError(f"launcher.{key}={value!r} is of no use", do=do)
