"""From Hydra's composed configuration to plain, checked values that a worker can use."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from sweeper.config import check_key
from sweeper.errors import ConfigError
from sweeper.launch.slurm_settings import check as check_slurm
from sweeper.reading import hide_password
from sweeper.records import NewSweep
from sweeper.search import grid, is_grid, make, space_of
from sweeper.tracking.wandb_source import Wanted
from sweeper.trainer.settings import check as check_checkpoint

OURS = (
    "sampler",
    "pruner",
    "launcher",
    "checkpoint",
    "retry",
    "resume",
    "lease",
    "mirror",
    "tracking",
    "sweep",
)
"""Groups a worker reads: resolved once, at the launch."""

_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")
# An author is no authorization, and PWD is where one is.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|AUTH(?!OR(?!I[ZS]))|DSN|CRED|PRIVATE", re.IGNORECASE)
_NO_SECRETS = ("PWD", "OLDPWD")
_URL_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]*:[^\s@]+@", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Settings:
    """A launch, checked."""

    new: NewSweep
    storage: str
    allow_network_file_system: bool
    data_dir: Path
    resume_from_wandb: Wanted | None = None

    @property
    def is_one_run(self) -> bool:
        """Whether one run was asked for from W&B: then no other trial is drawn."""
        return self.resume_from_wandb is not None and self.resume_from_wandb.run_id is not None

    @property
    def launcher(self) -> dict[str, Any]:
        """The `launcher` group."""
        launcher: dict[str, Any] = self.new.config["launcher"]
        return launcher


def read(cfg: DictConfig, *, command: Sequence[str] = ()) -> Settings:
    """Check the composed configuration and freeze it.

    Args:
        cfg: What Hydra composed.
        command: The launch's arguments, for the command that trains a run again.

    Raises:
        ConfigError: Naming the key, what is wrong with it, and what to do.
    """
    try:
        config = freeze(cfg)
        storage = OmegaConf.to_container(cfg.storage, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            "the configuration cannot be resolved", why=str(error).splitlines()[0], do="Set what is missing."
        ) from error
    assert isinstance(storage, dict)
    sweep = config["sweep"]
    sweep["params"] = sweep.get("params") or {}
    wanted = Wanted.parse(str(name)) if (name := config.pop("resume_from_wandb")) is not None else None
    if wanted is not None and wanted.sweep != sweep["name"]:
        raise ConfigError(
            f"resume_from_wandb={name} is of sweep {wanted.sweep!r}, and this is sweep {sweep['name']!r}",
            do=f"Launch with sweep.name={wanted.sweep}.",
        )
    check_values(config)
    check_trainer(str(config["trainer"]["_target_"]))
    check_command(cfg)
    check_storage(str(storage["url"]))
    config["space"] = space_of(sweep["params"])
    for key in config["space"]:
        check_key(config, key)
    config["command"] = list(command)
    make(config["sampler"], kind="sampler", **_grid_arguments(config))
    make(config["pruner"], kind="pruner")
    points = grid(config["space"]) if is_grid(config["sampler"]) else ()
    n_trials = min(sweep["n_trials"], len(points)) if points else sweep["n_trials"]
    new = NewSweep(
        sweep["name"], sweep["seed"], n_trials, sweep["metric"], sweep["direction"], config, points
    )
    return Settings(
        new, str(storage["url"]), bool(storage["allow_network_file_system"]), Path(str(cfg.data_dir)), wanted
    )


def _grid_arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {"search_space": {}} if is_grid(config["sampler"]) else {"seed": 0}


def freeze(cfg: DictConfig) -> dict[str, Any]:
    """Plain values: our groups resolved, others with environment defaults frozen.

    Interpolations of secrets stay text wherever they are, so that no key reaches a file.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    result: dict[str, Any] = {}
    for name in plain:
        key = str(name)
        if key in ("hydra", "storage"):
            continue
        node = plain[name]
        frozen = _resolved(cfg, key, node) if key in OURS or key == "data_dir" else _frozen(node, cfg)
        result[key] = _without_secrets(frozen, node)
    return result


def is_secret(name: str, value: str) -> bool:
    """Whether a variable of the environment is one, by its name or as a URL with a password."""
    is_named_so = name not in _NO_SECRETS and _SECRET.search(name) is not None
    return is_named_so or _URL_WITH_PASSWORD.search(value) is not None


def _without_secrets(value: Any, raw: Any) -> Any:
    """Wherever a secret's value got in by some detour, the text it was written as."""
    if isinstance(value, dict) and isinstance(raw, dict):
        return {key: _without_secrets(value[key], raw.get(key)) for key in value}
    if isinstance(value, list) and isinstance(raw, list):
        return [_without_secrets(item, text) for item, text in zip(value, raw, strict=True)]
    secrets = (text for name, text in os.environ.items() if is_secret(name, text) and len(text) >= 8)
    holds_one = isinstance(value, str) and any(secret in value for secret in secrets)
    return raw if holds_one else value


def _resolved(parent: Any, key: Any, raw: Any) -> Any:
    """The value at `key` of a composed node with every interpolation resolved but those of secrets."""
    if isinstance(raw, dict):
        return {name: _resolved(parent[key], name, value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [_resolved(parent[key], index, value) for index, value in enumerate(raw)]
    if not (isinstance(raw, str) and "${" in raw) or _has_secret(raw):
        return raw
    value = parent[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _has_secret(text: str) -> bool:
    return any(is_secret(name, os.environ.get(name, "")) for name in _ENVIRONMENT.findall(text))


def _frozen(node: Any, cfg: DictConfig) -> Any:
    if isinstance(node, dict):
        return {key: _frozen(value, cfg) for key, value in node.items()}
    if isinstance(node, list):
        return [_frozen(value, cfg) for value in node]
    if isinstance(node, str) and _ENVIRONMENT.search(node) and not _has_secret(node):
        resolved = OmegaConf.create({"value": node})
        resolved._set_parent(cfg)
        return resolved.value
    return node


def check_values(config: dict[str, Any]) -> None:
    """Refuse values that could only fail later."""
    for key in ("launcher", "sweep", "lease", "resume", "retry", "checkpoint", "tracking", "mirror"):
        _need(isinstance(config.get(key), dict), key, config.get(key), "It is a group: leave it in place.")
    n_workers = config["launcher"].get("n_workers")
    _need(n_workers is not None, "launcher.n_workers", n_workers, "Use a number of workers, at least 1.")
    sweep, launcher, lease = config["sweep"], config["launcher"], config["lease"]
    _need(
        _is_count(sweep["n_trials"]) and 1 <= sweep["n_trials"] <= 10**9,
        "sweep.n_trials",
        sweep["n_trials"],
        "Use a number of trials, at least 1.",
    )
    _need(
        _is_count(sweep["seed"]) and abs(sweep["seed"]) < 2**63,
        "sweep.seed",
        sweep["seed"],
        "Use a whole number of at most 63 bits.",
    )
    _need(
        sweep["direction"] in ("minimize", "maximize"),
        "sweep.direction",
        sweep["direction"],
        "Use minimize or maximize.",
    )
    _need(
        isinstance(sweep["metric"], str) and sweep["metric"],
        "sweep.metric",
        sweep["metric"],
        "Use the name of a reported metric.",
    )
    _need(
        isinstance(sweep["params"], dict),
        "sweep.params",
        sweep["params"],
        "Use keys like trainer.lr with a search space each.",
    )
    _need(
        config["resume"]["mode"] in ("auto", "must", "never"),
        "resume.mode",
        config["resume"]["mode"],
        "Use auto, must or never.",
    )
    _need(
        isinstance(config["resume"]["overwrite"], bool),
        "resume.overwrite",
        config["resume"]["overwrite"],
        "Use true or false.",
    )
    _need(
        config["resume"]["on_invalid"] in ("fresh", "fail"),
        "resume.on_invalid",
        config["resume"]["on_invalid"],
        "Use fresh or fail.",
    )
    trainer = config["trainer"] if isinstance(config["trainer"], dict) else {}
    check_checkpoint(
        config["checkpoint"],
        config={key: value for key, value in trainer.items() if key != "_target_"},
        num_trials=sweep["n_trials"],
    )
    for key, value in {f"retry.{key}": value for key, value in config["retry"].items()}.items():
        _need(_is_count(value) and value >= 0, key, value, "Use a number of attempts, 0 or more.")
    known = {"heartbeat_s", "ttl_s", "progress_s", "grace_s", "ranks_s"}
    _need(set(lease) == known, "lease", sorted(lease), f"It has {', '.join(sorted(known))}.")
    for key in sorted(known):
        least = 0 if key == "progress_s" else 1e-9
        _need(
            _is_number(lease[key]) and lease[key] >= least,
            f"lease.{key}",
            lease[key],
            "Use a number of seconds.",
        )
    stop = sweep["stop_after_s"]
    _need(
        stop is None or (_is_number(stop) and stop > 0),
        "sweep.stop_after_s",
        stop,
        "Use a number of seconds, or null.",
    )
    gpus = launcher.get("gpus_per_worker", 0)
    _need(
        _is_count(gpus) and gpus >= 0,
        "launcher.gpus_per_worker",
        gpus,
        "Use a number of devices, 0 for none.",
    )
    ranks = launcher.get("ranks_per_worker", 1)
    _need(type(ranks) is int and ranks >= 1, "launcher.ranks_per_worker", ranks, "Use a number of processes.")
    board = config["tracking"]["tensorboard"]["enabled"]
    _need(isinstance(board, bool), "tracking.tensorboard.enabled", board, "Use true or false.")
    _need(
        lease["ttl_s"] >= 3 * lease["heartbeat_s"],
        "lease.ttl_s",
        lease["ttl_s"],
        "Use at least three heartbeats.",
    )
    for key, value in launcher.items():
        bad = any(not character.isprintable() for character in str(value))
        _need(
            not bad, f"launcher.{key}", value, "It becomes a line of a script: use printable characters only."
        )
    if launcher.get("kind") == "slurm":
        check_slurm(launcher)
    workers = launcher.get("n_workers", 1)
    _need(
        _is_count(workers) and 1 <= workers <= 10_000,
        "launcher.n_workers",
        workers,
        "Use a number of workers, at least 1.",
    )
    target = config["trainer"].get("_target_") if isinstance(config["trainer"], dict) else None
    _need(
        isinstance(target, str) and "." in target,
        "trainer._target_",
        target,
        "Name an importable function, e.g. my_package.my_module.train.",
    )
    from sweeper.launch.tensorboard import BoardSettings
    from sweeper.mirror import MirrorSettings
    from sweeper.tracking import TrackingSettings

    # As workers elsewhere shall see it: absolute.
    config["mirror"]["url"] = MirrorSettings.from_config(config["mirror"]).url

    TrackingSettings.from_config(config["tracking"])
    BoardSettings.from_config(config["tracking"])


def check_trainer(target: str) -> None:
    """Refuse a function that cannot be there, without importing what it lies in.

    Raises:
        ConfigError: There is no such module, or its source does not mention the function.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:
        spec, why = None, f"{type(error).__name__}: {error}"
    else:
        why = f"there is no module {module}"
    source = Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
    if spec is not None and (
        source is None or re.search(rf"\b{re.escape(name)}\b|import \*", source.read_text())
    ):
        return
    raise ConfigError(
        f"trainer._target_={target} cannot be imported",
        why=why if spec is None else f"{source} has no {name}",
        do="Name an importable function def train(cfg, run) -> float.",
    )


def check_command(cfg: DictConfig) -> None:
    """Refuse a program that is not there, or settings of it that could only fail later. Raises ConfigError."""
    from sweeper.command.settings import TARGET, Command

    if cfg.trainer.get("_target_") == TARGET:
        trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
        assert isinstance(trainer, dict)
        command = Command.from_config({str(key): value for key, value in trainer.items()})
        given = {name: value for name, value in command.env.items() if value is not None}
        command.program({**os.environ, **given})
        ranks = cfg.launcher.get("ranks_per_worker", 1)
        do = "A program starts its own ranks: trainer.argv=[torchrun, …]."
        _need(ranks == 1, "launcher.ranks_per_worker", ranks, do)


def check_storage(url: str) -> None:
    """Refuse a database this version cannot use. Raises ConfigError."""
    try:
        backend = make_url(url).get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            f"storage.url={hide_password(url)!r} is not a database URL",
            do="Use e.g. sqlite:///outputs/sweeper.db.",
        ) from error
    if backend not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"storage.url: {backend} is not supported",
            do="Use sqlite:///PATH on a local disk, or postgresql://USER@HOST/DATABASE (`sweeper db up` starts one).",
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _need(is_good: object, key: str, value: Any, do: str) -> None:
    if not is_good:
        raise ConfigError(f"{key}={value!r} cannot be used", do=do)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of a sweep's identity differs between two configurations, a line each."""
    old, new = _identity(before), _identity(after)
    return [
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    sweep = config["sweep"]
    flat = {
        "sweep.seed": sweep["seed"],
        "sweep.metric": sweep["metric"],
        "sweep.direction": sweep["direction"],
    }
    flat |= {"sweep.run_seed": sweep.get("run_seed")}
    flat |= {f"sweep.params.{key}": value for key, value in sweep["params"].items()}
    searched = set(sweep["params"])
    flat |= {key: value for key, value in _flat("trainer", config["trainer"]) if key not in searched}
    if is_grid(config["sampler"]):
        flat["sampler"] = config["sampler"]["_target_"]
    return flat


def _flat(prefix: str, node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [item for key, value in node.items() for item in _flat(f"{prefix}.{key}", value)]
    return [(prefix, node)]


def thread_count(n_workers: int) -> int:
    """Threads of each trainer: the cores shared out, or what OMP_NUM_THREADS says."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    return int(given) if given.isdigit() and int(given) > 0 else max(1, cores // n_workers)
