"""The peers: an environment of their own, and how each is started. Their programs are in bench/scripts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contenders import Contender
from bench.failures import EVERY_STEPS
from bench.floors import SCRIPTS, answer_of, timed
from bench.processes import Failed, last_line, scratch
from bench.table import Cell, Missing, Series

HERE = Path(__file__).parent
HOME = HERE / ".peers"
REQUIREMENTS = HERE / "peers.txt"
OLD = HOME / "hydra-optuna"
OLD_REQUIREMENTS = HERE / "peers-hydra-optuna.txt"
INSTALL_S = 1800.0


# --- their environments ---------------------------------------------------------------------


def install(say: Callable[[str], None]) -> None:
    """Create what is missing; what cannot be installed is named, left out, and tried again next time."""
    if not _is_current(HOME, REQUIREMENTS):
        say("installing the peers into bench/.peers (once, a few minutes)")
        _create(HOME)
        if _install_peers(_lines(REQUIREMENTS), say):
            _stamp(HOME, REQUIREMENTS)
    if not _is_current(OLD, OLD_REQUIREMENTS):
        # hydra-optuna-sweeper needs an Optuna before 3; torch it borrows from the others.
        _create(OLD)
        if _pip(OLD, _lines(OLD_REQUIREMENTS), say):
            (_site(OLD) / "peers.pth").write_text(f"{_site(HOME)}\n")
            _stamp(OLD, OLD_REQUIREMENTS)


def _install_peers(wanted: list[str], say: Callable[[str], None]) -> bool:
    # torch first and alone: nothing that comes later may choose another build of it.
    torch = next(line for line in wanted if line.startswith("torch=="))
    if not _pip(HOME, [torch], say):
        return False
    return _pip(HOME, wanted, say) or all([_pip(HOME, [torch, line], say) for line in wanted])


def _create(home: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=300, env=_bare())


def _pip(home: Path, requirements: list[str], say: Callable[[str], None]) -> bool:
    argv = [str(home / "bin" / "pip"), "install", "--quiet", *requirements]
    done = subprocess.run(argv, capture_output=True, timeout=INSTALL_S, env=_bare())
    if done.returncode:
        say(f"cannot install {' '.join(requirements)}: {last_line(done.stderr)}")
    return done.returncode == 0


def _bare() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def _site(home: Path) -> Path:
    return next((home / "lib").glob("python3*")) / "site-packages"


def _digest(requirements: Path) -> str:
    return hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()


def _stamp(home: Path, requirements: Path) -> None:
    (home / "installed").write_text(_digest(requirements))


def _is_current(home: Path, requirements: Path) -> bool:
    stamp = home / "installed"
    return stamp.exists() and stamp.read_text() == _digest(requirements)


# --- their programs -------------------------------------------------------------------------


def python(script: str, *arguments: object, home: Path = HOME) -> list[str]:
    """A command line that runs one of our scripts in the peers' environment."""
    return [str(home / "bin" / "python"), str(SCRIPTS / script), *map(str, arguments)]


def trial_programs(count: int) -> dict[str, Contender]:
    """Rows 1 and 2: everybody who runs many trials, two at a time."""

    def hydra(directory: Path) -> list[str]:
        overrides = ("hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2", f"+n=range({count})")
        return python("peer_hydra_trials.py", "-m", f"hydra.sweep.dir={directory}/multirun", *overrides)

    def hydra_optuna(directory: Path) -> list[str]:
        sweeper = {
            "n_trials": count,
            "n_jobs": 2,
            "study_name": "b",
            "storage": f"sqlite:///{directory}/optuna.db",
        }
        overrides = [f"hydra.sweeper.{key}={value}" for key, value in sweeper.items()]
        groups = ("hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "+lr=interval(0.001,0.1)")
        place = f"hydra.sweep.dir={directory}/multirun"
        return python("peer_hydra_trials.py", "-m", *groups, place, *overrides, home=OLD)

    contenders = (
        Contender("Ray Tune, actors reused", lambda d: python("peer_ray_trials.py", d, count, "reuse")),
        Contender("Ray Tune", lambda d: python("peer_ray_trials.py", d, count, "fresh")),
        Contender("Syne Tune", lambda d: python("peer_syne_trials.py", d, count)),
        Contender("submitit local", lambda d: python("peer_submitit_trials.py", d, count)),
        Contender("Hydra submitit-local", hydra),
        Contender("hydra-optuna-sweeper, no process", hydra_optuna),
    )
    return {contender.name: contender for contender in contenders}


FAST = frozenset({"Ray Tune, actors reused", "hydra-optuna-sweeper, no process"})
"""Those who start no process for a trial: more trials are measured."""

LONG_RUNS = (
    Contender("plain loop", lambda d: python("peer_plain.py", d, EVERY_STEPS), is_supervised=False),
    Contender("Lightning", lambda d: python("peer_lightning.py", d, EVERY_STEPS), is_supervised=False),
    Contender("Ray Tune", lambda d: python("peer_ray_long.py", d, EVERY_STEPS)),
)
"""Rows 5 to 7."""


def asks(kind: str, *, workers: int, acts: int, limit_s: float) -> dict[str, Any]:
    """Row 3: Optuna's ask + tell on `sqlite` or `journal`."""
    with scratch() as directory:
        argv = python("peer_optuna_asks.py", directory, workers, acts, limit_s, kind)
        return answer_of(argv, timeout_s=60 + 10 * limit_s)


def listing_s(*, runs: int, unfinished: int) -> Cell:
    """Row 4: Optuna lists the unfinished trials of a study."""
    try:
        with scratch() as directory:
            fill = python("peer_optuna_list.py", directory, "fill", runs, unfinished)
            timed(fill, repeats=1)
            return timed(python("peer_optuna_list.py", directory, "list"), repeats=1, timeout_s=300)
    except Failed as error:
        return Missing(str(error))


STALLS = {
    "torch.save + fsync": "plain",
    "Lightning": "lightning",
    "Lightning async": "lightning_async",
    "DCP async": "dcp_async",
    "Ray Tune report": "ray",
}


TOTALS = ("torch.save + fsync", "DCP async", "Lightning")
"""Peers of row 8 that are measured from begin to durable end in row 9, too."""


def save_ms(kind: str, key: str, *, size_mb: int, repeats: int) -> Cell:
    """Rows 8 and 9: how long one save keeps the loop waiting (`stall_s`), or takes in all (`total_s`)."""
    try:
        with scratch() as directory:
            argv = python("peer_stall.py", directory, size_mb, repeats, kind)
            seconds = answer_of(argv, timeout_s=180)[key]
    except Failed as error:
        return Missing(str(error))
    return Series(tuple(1e3 * second for second in seconds))
