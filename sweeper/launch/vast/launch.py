"""`launch` with launcher=vast: check everything here, rent there; and what --dry-run shows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sweeper import clock, fsops
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, ConfigError
from sweeper.launch.settings import Settings
from sweeper.launch.vast import plan as planning
from sweeper.launch.vast import script as scripting
from sweeper.launch.vast.client import Client, Offer, env_option
from sweeper.launch.vast.copies import project_path
from sweeper.launch.vast.ledger import Ledger, held, path_of
from sweeper.launch.vast.plan import Plan
from sweeper.launch.vast.renting import Asked, Renter
from sweeper.mirror.settings import check_url
from sweeper.report.hints import next_command

CHECK = '"$SWEEPER_PYTHON" -m sweeper.launch.vast.copies check "$SWEEP"'
"""Completes the copy, and sees that it is whole; a line of the script."""

FINISH, FINISH_S = "tracking.wandb.finish_timeout", 600
"""An instance has nothing better to do than to wait for its last upload: nobody can send it later."""

KEY = "WANDB_API_KEY"
"""Without it an instance cannot log in to W&B."""

_LINES = "lines of your own with launcher.save and launcher.restore"

SHOWN = Path(".vast") / "onstart.sh"
"""Where the script lies that an instance starts with, to be read; in the current directory."""


@dataclass(frozen=True, slots=True)
class Job:
    """A sweep for VastAI, checked: nothing of it can be refused later but by VastAI.

    Attributes:
        command: This launch's arguments, as they are kept to go on with.
        wandb: The W&B project to look for a copy in; "" where the mirror has it, or the user names one.
    """

    sweep: str
    plan: Plan
    arguments: list[str]
    command: list[str]
    environment: dict[str, str]
    data_dir: Path
    client: Client
    wandb: str

    @classmethod
    def of(cls, settings: Settings, *, command: list[str], is_shut_down: bool = False) -> Job:
        """Raises ConfigError."""
        plan = Plan.of(settings.launcher)
        if is_shut_down:
            plan = replace(plan, auto_shutdown=True)
        has_mirror, has_wandb = _copies(settings.new.config, plan)
        if has_mirror and _is_directory(settings.new.config):
            # What the user's lines carry away is whole before.
            plan = replace(plan, save=(CHECK, *plan.save))
        elif has_mirror or has_wandb:
            plan = replace(plan, save=(*plan.save, CHECK))
        environment = scripting.environment(plan)
        env_option(environment)
        arguments = scripting.arguments(
            settings.new.config["command"], plan, sweep=settings.new.name, n_trials=settings.new.n_trials
        )
        if has_wandb and not any(FINISH in argument for argument in arguments):
            arguments.append(f"{FINISH}={FINISH_S}")
        scripting.refuse_secrets([*arguments, *command, *_lines(plan)], plan)
        return cls(
            settings.new.name, plan, arguments, command, environment, settings.data_dir,
            Client(secrets=environment.values()),
            "" if has_mirror or not has_wandb or settings.resume_from_wandb else project_path(settings.new.config),
        )  # fmt: skip

    def script(self, series: str, *, limit_s: float, is_fresh: bool) -> str:
        """What an instance runs."""
        module = ["sweeper.launch.vast.copies", "launch", self.wandb, self.sweep]
        launch = [*(module if self.wandb and not is_fresh else ["sweeper", "launch"]), *self.arguments]
        return scripting.script(
            self.plan, self.sweep, series, limit_s=limit_s, launch=launch, is_fresh=is_fresh
        )

    def writer(self, series: str) -> Callable[[float, bool], Path]:
        """Writes the script, plain to be read and packed to be sent; returns the latter's path."""

        def write(limit_s: float, is_fresh: bool) -> Path:
            text = self.script(series, limit_s=limit_s, is_fresh=is_fresh)
            path = path_of(self.data_dir.resolve(), self.sweep).with_name("onstart.packed.sh")
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fsops.replace(path, scripting.packed(text).encode())
            show(text)
            return path

        return write


def _lines(plan: Plan) -> tuple[str, ...]:
    return (
        *plan.setup_lines,
        *plan.data,
        *plan.restore,
        *plan.save,
        plan.git_url or "",
        plan.query,
        plan.image,
    )


def _copies(config: Mapping[str, Any], plan: Plan, here: Mapping[str, str] = os.environ) -> tuple[bool, bool]:
    """Whether there is a mirror, and whether W&B gets the checkpoints.

    Raises:
        ConfigError: Nothing would survive the instance, and there are no lines of the user's own.
    """
    has_mirror = bool((config.get("mirror") or {}).get("url"))
    wandb = config["tracking"]["wandb"]
    uploads = (wandb.get("upload_checkpoints") or "never") != "never"
    why_not = _why_offline(wandb.get("mode"), plan, here)
    has_wandb = uploads and not why_not
    if plan.save:
        return has_mirror, has_wandb
    if has_mirror and _is_directory(config):
        raise ConfigError(
            "mirror.url is a directory, which an instance takes with it when it is destroyed",
            do=f"Use a store, e.g. s3://bucket/prefix; or carry it away with {_LINES}.",
        )
    if not has_mirror and uploads and why_not:
        raise ConfigError(
            "tracking.wandb.upload_checkpoints is the only copy of the sweep, and nothing would be uploaded",
            why=why_not[0],
            do=f"{why_not[1]}, or set mirror.url=, or {_LINES}.",
        )
    if not has_mirror and not uploads:
        raise ConfigError(
            "launcher=vast needs a place where the sweep survives its instance",
            do=f"Set mirror.url=, or tracking.wandb.upload_checkpoints=last, or {_LINES}.",
        )
    return has_mirror, has_wandb


def _is_directory(config: Mapping[str, Any]) -> bool:
    """Whether the mirror is one of the file system's, and so on the instance's own disk."""
    url = check_url(config["mirror"]["url"]) or ""
    return url.partition("://")[0].lower() in ("file", "local")


def _why_offline(mode: str | None, plan: Plan, here: Mapping[str, str]) -> tuple[str, str] | None:
    """Why W&B gets nothing from an instance, and what to do; None if it does."""
    if mode is None and "WANDB_MODE" in plan.env and (handed := here.get("WANDB_MODE")):
        mode = handed if handed in ("offline", "disabled") else None
    if mode not in (None, "online"):
        return f"its mode is {mode} there", "Set tracking.wandb.mode=online"
    if KEY not in plan.env:
        return f"{KEY} is not in launcher.env", f"Set launcher.env=[{KEY}]"
    return None


def show(text: str) -> None:
    """Save the script where people can read it."""
    SHOWN.parent.mkdir(exist_ok=True)
    SHOWN.write_text(text, encoding="utf-8")


def launch(settings: Settings, *, command: list[str], is_detached: bool, is_shut_down: bool) -> int:
    """Rent and follow until the sweep is complete; returns the exit code."""
    job = Job.of(settings, command=command, is_shut_down=is_shut_down)
    with held(path_of(job.data_dir, job.sweep)), Asked() as asked:
        ledger = Ledger.open(job.data_dir, job.sweep, command)
        again = next_command("resume", job.sweep, storage=settings.storage, data_dir=job.data_dir)
        renter = Renter(
            job.plan, ledger, job.client, write_script=job.writer(ledger.series), environment=job.environment,
            again=again, asked=asked, is_detached=is_detached,
        )  # fmt: skip
        return renter.run()


def dry_run(settings: Settings, *, command: list[str], is_shut_down: bool) -> int:
    """Print what would be rented, what it costs, and the script. Nothing is rented."""
    job = Job.of(settings, command=command, is_shut_down=is_shut_down)
    plan, ledger = job.plan, Ledger.open(job.data_dir, job.sweep, command)
    offers = job.client.search(planning.query(plan), is_bid=plan.interruptible, disk_gb=plan.disk_gb)
    offer = planning.choose(offers, plan, avoid=ledger.avoid)
    print(f"asked for: {planning.query(plan)}")
    if offer is None:
        print(
            f"nothing fits ({len(offers)} offers); raise launcher.max_usd_h, or ask for less", file=sys.stderr
        )
        return EXIT_NOT_WELL
    limit_s = planning.left(
        plan, spent_usd=ledger.spent_usd, began_at_s=ledger.began_at_s, now_s=clock.wall_s()
    ).limit_s(planning.usd_h(offer, plan))
    text = job.script(ledger.series, limit_s=limit_s, is_fresh=plan.fresh)
    size = len(scripting.packed(text))
    print(_described(offer, plan, limit_s))
    if job.environment:
        print(f"with the variables {', '.join(job.environment)} of this shell")
    show(text)
    print(f"{SHOWN} ({size} of {scripting.MAX_CHARACTERS} characters, packed):\n\n{text}", end="")
    return EXIT_OK


def _described(offer: Offer, plan: Plan, limit_s: float) -> str:
    price = planning.usd_h(offer, plan)
    offered = planning.bid(offer, plan)
    how = "on demand" if offered is None else f"interruptible, with a bid of ${offered:.4f}"
    worst = price * limit_s / 3600
    return (
        f"would rent: offer {offer.offer_id}, {offer.num_gpus}x {offer.gpu_name} in {offer.where}, "
        f"reliability {offer.reliability:.3f}, {how}\n"
        f"costs: ${price:.4f} per hour; at most ${worst:.2f} in {limit_s / 3600:.1f} h "
        f"(budget ${plan.budget_usd:.2f}, time limit {plan.time_limit_h:g} h); network traffic comes on top"
    )
