"""`sweeper launch` and `sweeper resume`: compose, create or continue the sweep, start workers."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import checkpoints, rundir
from sweeper.database import create_database
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, ConfigError, NotWell, UsageError
from sweeper.launch.settings import Settings
from sweeper.reading import hide_password
from sweeper.records import Sweep
from sweeper.states import INCOMPLETE
from sweeper.store import Store
from sweeper.trainer.warm import Template

OPTIONAL_VARIABLES = (
    "SWEEPER_DATA_DIR",
    "DATA_DIR",
    "SWEEPER_STORAGE",
    "SAVE_INTERVAL",
    "KEEP_LAST",
    "TF_DIR",
    "TB_AUTO",
    "TB_PORT",
    "TB_HOST",
)
FLAGS = {
    "--dry-run": "is_dry",
    "--detach": "is_detached",
    "--wait": "is_waiting",
    "--auto-shutdown": "is_shut_down",
}
OPTIONS = {"--resume-from-wandb": "resume_from_wandb", "--resume-mode": "tracking.wandb.resume"}
"""Options that are another spelling of a key."""
KINDS = ("local", "slurm", "vast")


@dataclass(slots=True)
class Flags:
    """`launch`'s own flags, beside Hydra's."""

    is_dry: bool = False
    is_detached: bool = False
    is_waiting: bool = False
    is_shut_down: bool = False


def main(argv: list[str], *, template: Template | None = None) -> int:
    """Launch a sweep, or go on with it; returns the exit code.

    Args:
        argv: What follows `launch`: overrides, Hydra's flags, --dry-run, --detach, --wait.
        template: Where local workers' servers come from, started ahead.
    """
    flags, rest = _take_flags(argv)
    if {"--multirun", "-m"} & set(rest):
        raise UsageError(
            "launch is the sweep already, --multirun is not for it",
            do="Put the values into sweep.params (e.g. '+sweep.params={trainer.lr: \"choice(0.1,0.01)\"}' with sampler=grid) and drop --multirun.",
        )
    if (shell := _shell_to_complete(rest)) is not None:
        from sweeper.cli import verbs
        from sweeper.launch.completion import script

        print(script(shell, verbs()), end="")
        return EXIT_OK
    composed = compose([*rest, "hydra.run.dir=."] if flags.is_dry else rest)
    if composed is None:
        return EXIT_OK
    from sweeper.launch.settings import read

    settings = read(composed[0], command=_again(rest, composed[1]))
    if settings.launcher.get("kind") == "vast":
        return _on_vast(settings, [a for a in rest if not _may_hold_password(a)], flags)
    if flags.is_dry:
        return _dry_run(settings)
    _warn_of_searched(settings)
    _check_launcher(settings)
    sweep, store = prepare(settings)
    return start(
        sweep, store, storage=settings.storage, data_dir=settings.data_dir,
        flags=flags, template=template,
    )  # fmt: skip


def _on_vast(settings: Settings, command: list[str], flags: Flags) -> int:
    """The sweep's database is on the instance: nothing is made of it here."""
    from sweeper.launch.vast import launch as vast

    if flags.is_dry:
        return vast.dry_run(settings, command=command, is_shut_down=flags.is_shut_down)
    _warn_of_searched(settings)
    return vast.launch(
        settings, command=command, is_detached=flags.is_detached, is_shut_down=flags.is_shut_down
    )


def _check_launcher(settings: Settings) -> None:
    """Refuse what cannot start before anything is recorded. Raises ConfigError."""
    kind, new = settings.launcher.get("kind"), settings.new
    if kind not in KINDS:
        raise ConfigError(f"launcher={kind} is not known", do=f"Use one of {', '.join(KINDS)}.")
    if kind == "slurm":
        from sweeper.launch.slurm import Submission

        submission = Submission.of(
            new.name, settings.launcher, storage=settings.storage, data_dir=settings.data_dir
        )
        submission.check(min(settings.launcher["n_workers"], new.n_trials))


def _again(argv: list[str], overrides: list[str]) -> list[str]:
    """The command line of this launch without what a repetition sets itself."""
    given = [a for a in argv if a not in overrides]
    own = ("sweep.name=", "sweep.n_trials=", "sweep.run_seed=", "hydra.")
    kept = [o for o in overrides if not o.lstrip("+").startswith(own)]
    return [a for a in (*given, *kept) if not _may_hold_password(a)]


def _may_hold_password(override: str) -> bool:
    """Whether an override names a database, and perhaps a password: `storage.url=…`, `+storage={url: …}`."""
    key, _, value = override.lstrip("+~").partition("=")
    is_url = key.partition(".")[0] == "storage"
    return is_url and ("@" in value or "password" in value.lower())


def _take_flags(argv: list[str]) -> tuple[Flags, list[str]]:
    flags, rest = Flags(), []
    arguments = iter(argv)
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if argument in FLAGS:
            setattr(flags, FLAGS[argument], True)
        elif name in OPTIONS:
            if not (value := value if has_value else next(arguments, "")):
                raise UsageError(f"{name} needs a value", do=f"Use {name} VALUE, or {OPTIONS[name]}=VALUE.")
            rest.append(rundir.override(OPTIONS[name], value))
        else:
            rest.append(argument)
    return flags, rest


def _shell_to_complete(argv: list[str]) -> str | None:
    """The shell of `-sc install=SHELL`; Hydra's own script knows nothing of verbs."""
    asks = {"-sc", "--shell-completion"} & set(argv)
    return next((a.removeprefix("install=") for a in argv if asks and a.startswith("install=")), None)


def compose(argv: list[str]) -> tuple[Any, list[str]] | None:
    """Configuration and overrides as Hydra reads them; None when it only answered (--cfg, --help, …).

    Raises:
        ConfigError: Hydra refused.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    captured: list[Any] = []

    def task(cfg: Any) -> None:
        captured.append(cfg)
        # As typed: resolved, `trainer.token=${oc.env:HF_TOKEN}` would be the secret itself.
        captured.append(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))

    for name in [name for name in OPTIONAL_VARIABLES if os.environ.get(name) == ""]:
        del os.environ[name]  # set to nothing is not set
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    logging.raiseExceptions = False  # `--info | head` closes the pipe that Hydra logs to
    overrides = [a for a in argv if "=" in a and not a.startswith("-")] + [
        a for a in argv if a.startswith("~")
    ]
    # Hydra wants its flags before the overrides; people type them anywhere.
    sys.argv = ["sweeper launch", *(a for a in argv if a not in overrides), "--", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing a traceback and exiting
    try:
        hydra.main(version_base="1.3", config_path="pkg://sweeper_conf", config_name="config")(task)()
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            "the configuration is refused",
            why=_in_one_line(error),
            do="`python -m sweeper launch +sweep=simple --cfg job` shows what there is; --help explains overrides.",
        ) from error
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
    return (captured[0], captured[1]) if captured else None


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=")))


def _dry_run(settings: Settings) -> int:
    from sweeper.launch import local

    new = settings.new
    print(
        f"sweep {new.name}: {new.n_trials} trials in {settings.data_dir}, database {hide_password(settings.storage).rpartition('@')[2]}"
    )
    for key, value in sorted(new.config["sweep"]["params"].items()):
        print(f"  {key}: {value}")
    if settings.launcher["kind"] == "slurm":
        from sweeper.launch.slurm import Submission

        submission = Submission.of(
            new.name, settings.launcher, storage=settings.storage, data_dir=settings.data_dir
        )
        print(submission.text(min(settings.launcher["n_workers"], new.n_trials)), end="")
        return EXIT_OK
    if (wanted := settings.resume_from_wandb) is not None:
        print(
            f"  would fetch from W&B: {wanted.wandb_run_id or wanted.run_id or f'all runs of {wanted.sweep}'}"
        )
    for command in local.commands(new.name, n_workers=settings.launcher["n_workers"]):
        print(f"  would start: {' '.join(command)}")
    return EXIT_OK


def _warn_of_searched(settings: Settings) -> None:
    """An override of a parameter that is searched has no effect, which nobody would expect."""
    given = {o.lstrip("+").partition("=")[0] for o in settings.new.config["command"]}
    for key in sorted(given & set(settings.new.config["space"])):
        print(f"sweep {settings.new.name}: {key} is searched; its override has no effect", file=sys.stderr)


def prepare(settings: Settings) -> tuple[Sweep, Store]:
    """Create the database and the sweep, or check that the existing one is the same.

    Raises:
        ConfigError: The sweep exists with another identity, or its directories belong elsewhere.
        NotWell: resume.mode=must, and nothing resumes.
    """
    new = settings.new
    arrived = [*_join_copy(settings), *_fetch_from_wandb(settings)]
    create_database(settings.storage, allow_network_file_system=settings.allow_network_file_system)
    store = Store(settings.storage, allow_network_file_system=settings.allow_network_file_system)
    config = _with_deadline(new.config, store)
    found = store.find_sweep(new.name)
    is_fetched = new.config["mirror"]["url"] is not None or settings.resume_from_wandb is not None
    is_made_anew = found is None and is_fetched
    if is_made_anew:
        found = _rebuild(store, settings)
    if found is None:
        _refuse_foreign_directories(settings)
        store.create_sweep(new)
        store.update_sweep(new.name, n_trials=new.n_trials, config=config)
    else:
        _refuse_unknown(store, found, arrived, settings)
        _continue(store, found, settings, config)
        if is_made_anew and settings.is_one_run:
            _only_what_is_there(store, new.name)
    sweep = store.sweep(new.name)
    if new.config["resume"]["mode"] == "must":
        _must_resume(store, sweep, settings.data_dir)
    return sweep, store


def _join_copy(settings: Settings) -> list[str]:
    """Make the copy of the sweep ours, where there is one; returns the runs that have come from it.

    Raises:
        SystemExit: It failed and has said why, e.g. because another machine holds it (76).
    """
    url, name = settings.new.config["mirror"]["url"], settings.new.name
    from sweeper.mirror import generations, joining

    if url is None:
        if (token := generations.read_token(settings.data_dir, name)) is not None:
            print(f"[MIRROR] mirror.url is not given: the copy {token.url} is not kept up", file=sys.stderr)
        return []

    terms = joining.Terms(
        settings.new.config,
        _known_runs(settings),
        settings.new.config["resume"]["mode"] == "must" and settings.resume_from_wandb is None,
    )
    return joining.in_child("join", url, name, data_dir=settings.data_dir, terms=terms)


def _known_runs(settings: Settings) -> list[str] | None:
    """The runs of the sweep in the database, which is one that can be used; None when it does not know the sweep.

    Raises:
        ConfigError: It cannot be used, or knows a sweep of another definition.
    """
    create_database(settings.storage, allow_network_file_system=settings.allow_network_file_system)
    store = Store(settings.storage, allow_network_file_system=settings.allow_network_file_system)
    try:
        found = store.find_sweep(settings.new.name)
        if found is None:
            return None
        _refuse_changed(found, settings.new.config)
        return [run.run_id for run in store.runs(found.sweep_id)]
    finally:
        store.close()


def _fetch_from_wandb(settings: Settings) -> list[str]:
    """Fetch what resume_from_wandb names; returns the runs that are here now.

    Raises:
        SystemExit: It failed and has said why.
    """
    if settings.resume_from_wandb is None:
        return []
    from sweeper.tracking import TrackingSettings
    from sweeper.tracking.wandb_source import fetch_in_child

    config = settings.new.config
    return fetch_in_child(
        settings.resume_from_wandb, TrackingSettings.from_config(config["tracking"]).wandb,
        data_dir=settings.data_dir, overwrite=config["resume"]["overwrite"],
    )  # fmt: skip


def _only_what_is_there(store: Store, name: str) -> None:
    """One run was asked for: no other trial is drawn."""
    sweep = store.sweep(name)
    left, _ = store.count_left(sweep.sweep_id)
    if left:
        store.update_sweep(name, n_trials=sweep.n_trials - left, config=sweep.config)
        print(
            f"[W&B] sweep {name}: one run was asked for, so that no other trial is drawn; "
            "a launch without resume_from_wandb draws the rest",
            file=sys.stderr,
        )


def _rebuild(store: Store, settings: Settings) -> Sweep | None:
    """The sweep of a database that lacks it, made from its run directories; None where there are none."""
    from sweeper import rebuild

    name = settings.new.name
    sweep = rebuild.read_back(name, settings.data_dir)
    if sweep is None:
        return None
    store.restore(sweep)
    open_runs = sum(1 for run in sweep.runs if not run.state.is_final)
    print(
        f"[RESUME] sweep {name}: the database is made anew from {len(sweep.runs)} runs, {open_runs} of them incomplete",
        file=sys.stderr,
    )
    return store.sweep(name)


def _refuse_unknown(store: Store, found: Sweep, arrived: list[str], settings: Settings) -> None:
    """A database that knows the sweep, but not the runs that have come, is another history of it."""
    known = {run.run_id for run in store.runs(found.sweep_id)}
    if strange := [run_id for run_id in arrived if run_id not in known]:
        raise ConfigError(
            f"the database knows sweep {found.name!r}, but not {strange[0]}, which has come",
            do="Launch with a fresh data directory (data_dir=…), or another database (storage.url=…).",
        )


def _with_deadline(config: dict[str, Any], store: Store) -> dict[str, Any]:
    """The configuration with the time until which this launch draws trials."""
    after_s = config["sweep"]["stop_after_s"]
    return {**config, "stop_at": None if after_s is None else store.now_s() + float(after_s)}


def _refuse_foreign_directories(settings: Settings) -> None:
    there = next(rundir.run_dirs(settings.data_dir, settings.new.name), None)
    if there is not None:
        raise ConfigError(
            f"{there} exists, but the database knows of no sweep {settings.new.name!r}",
            do=f"Make the database anew with `sweeper --data-dir {settings.data_dir} rebuild {settings.data_dir}`, "
            "name the right database with storage.url=, or choose another sweep.name=.",
        )


def _refuse_changed(found: Sweep, config: dict[str, Any]) -> None:
    from sweeper.launch.settings import differences

    if changed := differences(found.config, config):
        raise ConfigError(
            f"sweep {found.name!r} exists with another definition ({'; '.join(changed)})",
            do="Launch it as it was, or choose another name with sweep.name=.",
        )


def _continue(store: Store, found: Sweep, settings: Settings, config: dict[str, Any]) -> None:
    new = settings.new
    _refuse_changed(found, config)
    n_trials = found.n_trials if settings.is_one_run else max(new.n_trials, found.n_trials)
    if new.n_trials < found.n_trials:
        print(
            f"sweep {new.name} has {found.n_trials} trials; sweep.n_trials can be raised, not lowered "
            f"(`sweeper cancel` ends it)",
            file=sys.stderr,
        )
    store.update_sweep(new.name, n_trials=n_trials, config=config)


def _must_resume(store: Store, sweep: Sweep, data_dir: Path) -> None:
    for run in store.runs(sweep.sweep_id, sorted(INCOMPLETE)):
        root = data_dir / run.path / rundir.CHECKPOINTS_DIR
        if checkpoints.newest_valid(root, run_id=run.run_id, starts=store.starts(run.run_id)) is not None:
            return
    raise NotWell(
        f"sweep {sweep.name!r} has no incomplete run with a valid checkpoint",
        why="resume.mode=must",
        do="`sweeper list` shows its runs; launch with resume.mode=auto to go on anyway.",
    )


def start(
    sweep: Sweep,
    store: Store,
    *,
    storage: str,
    data_dir: Path,
    flags: Flags | None = None,
    template: Template | None = None,
) -> int:
    """Start workers for what is left of a sweep; follow them, unless they are SLURM's. Returns the exit code."""
    from sweeper.settling import check_data_dir, tidy_final

    check_data_dir(store, sweep, data_dir)
    tidy_final(store, sweep, data_dir, say=lambda text: print(text, file=sys.stderr))
    left, incomplete = store.count_left(sweep.sweep_id)
    store.close()
    flags = flags or Flags()
    from sweeper.launch import local, progress

    if left == 0 and incomplete == 0:
        print(f"sweep {sweep.name} is complete: all {sweep.n_trials} trials are done", file=sys.stderr)
        _copy_rest(sweep, data_dir)
        return progress.final_report(sweep.name, storage=storage, data_dir=data_dir)
    if sweep.config["launcher"]["kind"] == "slurm":
        from sweeper.launch import slurm

        return slurm.launch(
            sweep, storage=storage, data_dir=data_dir, num_left=left + incomplete, is_waiting=flags.is_waiting
        )
    return local.run(
        sweep, storage=storage, data_dir=data_dir, num_left=left + incomplete,
        is_detached=flags.is_detached, template=template,
    )  # fmt: skip


def _copy_rest(sweep: Sweep, data_dir: Path) -> None:
    """Copy what ended while the store refused; no worker starts any more that would."""
    from sweeper.mirror import MirrorSettings
    from sweeper.mirror.mirror import Mirror

    mirror = Mirror(
        MirrorSettings.from_config(sweep.config.get("mirror")), data_dir=data_dir, sweep=sweep.name
    )
    mirror.start()
    mirror.close(lambda text: print(f"[MIRROR] {text}", file=sys.stderr))


def resume(name: str, *, storage: str, data_dir: Path, template: Template | None = None) -> int:
    """Start workers for what is unfinished of a sweep (or of a run's sweep), as it was launched."""
    match = rundir.RUN_ID.match(name)
    from sweeper.launch.vast.ledger import Ledger

    rented = None if match else Ledger.find(data_dir, name)
    if rented is not None:
        own = [argument for argument in rented.command if not argument.startswith("data_dir=")]
        return main([rundir.override("data_dir", str(data_dir)), *own], template=template)
    store = Store(storage)
    sweep = store.sweep(match[1] if match else name)
    if match:
        run = store.run(name)
        if run.state.is_final:
            print(f"run {name} is {run.state}; there is nothing to resume", file=sys.stderr)
            return EXIT_OK if run.state == "completed" else EXIT_NOT_WELL
    if url := (sweep.config.get("mirror") or {}).get("url"):
        from sweeper.mirror import joining

        joining.in_child("check", url, sweep.name, data_dir=data_dir)
    store.update_sweep(sweep.name, n_trials=sweep.n_trials, config=_with_deadline(sweep.config, store))
    return start(store.sweep(sweep.name), store, storage=storage, data_dir=data_dir, template=template)
