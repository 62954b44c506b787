"""What worker and tracker process say to each other: one JSON object a line, in both directions.

Worker → tracker: `begin`, `end`, `close`. Tracker → worker: events (see `Tracker.poll`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sweeper.errors import ConfigError

MODES = ("online", "offline", "disabled")
RESUMES = ("allow", "must", "never")
UPLOADS = ("never", "last", "best", "all")


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """tracking.wandb.*

    Attributes:
        mode: online, offline or disabled; None: $WANDB_MODE, else online when a key is configured,
            else offline.
        resume: What a resumed run expects on the server: allow, must or never.
        group: Default: the sweep's name.
        dir: Where `wandb/` is created; default: the run directory.
        init_timeout_s: How long the tracker waits for the server at the start of a run.
        finish_timeout_s: How long the tracker waits for the server at the end of a run.
        upload_checkpoints: Which become artifacts: never, last, best or all.
    """

    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    resume: str = "allow"
    group: str | None = None
    tags: tuple[str, ...] = ()
    dir: str | None = None
    init_timeout_s: float = 90.0
    finish_timeout_s: float = 30.0
    upload_checkpoints: str = "never"

    @property
    def is_enabled(self) -> bool:
        """Whether W&B is wanted at all."""
        return self.mode != "disabled"


@dataclass(frozen=True, slots=True)
class TensorboardSettings:
    """tracking.tensorboard.*

    Attributes:
        is_enabled: Whether event files are written.
        dir: Root of all event files ($TF_DIR), `<dir>/<sweep>/<run_id>`; default: `tensorboard/` in
            the run directory.
    """

    is_enabled: bool = True
    dir: str | None = None


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """The config group `tracking`, checked."""

    wandb: WandbSettings = field(default_factory=WandbSettings)
    tensorboard: TensorboardSettings = field(default_factory=TensorboardSettings)

    @property
    def is_enabled(self) -> bool:
        """Whether there is anything for a tracker process to do."""
        return self.wandb.is_enabled or self.tensorboard.is_enabled

    @classmethod
    def from_config(cls, tracking: Mapping[str, Any]) -> TrackingSettings:
        """Read `cfg.tracking` as a plain dict; absent keys and nulls keep their defaults.

        Keys: `wandb.{mode,project,entity,resume,group,tags,dir,init_timeout,finish_timeout,upload_checkpoints}` and
        `tensorboard.{enabled,dir}`; others are left to those who use them.

        Raises:
            ConfigError: A value is not one of those allowed.
        """
        wandb = dict(tracking.get("wandb") or {})
        board = dict(tracking.get("tensorboard") or {})
        return cls(
            wandb=WandbSettings(
                mode=_choice("tracking.wandb.mode", wandb.get("mode"), MODES),
                project=_text(wandb.get("project")),
                entity=_text(wandb.get("entity")),
                resume=_resume(wandb.get("resume")),
                group=_text(wandb.get("group")),
                tags=tuple(str(tag) for tag in wandb.get("tags") or ()),
                dir=_text(wandb.get("dir")),
                init_timeout_s=_seconds("tracking.wandb.init_timeout", wandb.get("init_timeout"), 90.0),
                finish_timeout_s=_seconds("tracking.wandb.finish_timeout", wandb.get("finish_timeout"), 30.0),
                upload_checkpoints=_choice(
                    "tracking.wandb.upload_checkpoints", wandb.get("upload_checkpoints"), UPLOADS
                )
                or "never",
            ),
            tensorboard=TensorboardSettings(
                is_enabled=board.get("enabled") in (None, True), dir=_text(board.get("dir"))
            ),
        )


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "") else None


def _choice(key: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    text = _text(value)
    if text is not None and text not in allowed:
        raise ConfigError(f"{key}={value!r} is not known", do=f"Use one of {', '.join(allowed)}, or null.")
    return text


def _resume(value: Any) -> str:
    # wandb's own resume=True means "auto": a file in a shared directory decides. Never that.
    return "allow" if value is True else _choice("tracking.wandb.resume", value, RESUMES) or "allow"


def _seconds(key: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 86400:
        raise ConfigError(f"{key}={value!r} is not a number of seconds", do="Use e.g. 30.")
    return float(value)


# --- messages ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """An attempt of a run begins; its metrics log is followed from now on.

    Attributes:
        lease_epoch: This attempt's fencing number: when a newer one shows up in the run directory,
            the tracker stops following and tells W&B nothing more.
        config: The run's hyperparameters and settings, for W&B; without secrets.
        metric: Name of the metric that the sweep optimizes, whose best value is kept in the summary.
        direction: minimize or maximize.
        start_step: Where the training goes on, 0 for a fresh start.
        keep_last: How many checkpoints a run keeps.
    """

    run_dir: str
    run_id: str
    sweep: str
    wandb_run_id: str
    attempt: int
    lease_epoch: int
    config: dict[str, Any]
    settings: TrackingSettings
    metric: str = ""
    direction: str = "minimize"
    start_step: int = 0
    keep_last: int = 3


@dataclass(frozen=True, slots=True)
class End:
    """The attempt is over; every row it wrote is in the metrics log.

    Attributes:
        state: The run's state now; final states close the W&B run as finished or failed.
        summary: More values for W&B's summary.
    """

    run_id: str
    outcome: str
    state: str
    value: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing more will come: answer `closed` and end."""


Message = Begin | End | Close
_NAMES: dict[type[Message], str] = {Begin: "begin", End: "end", Close: "close"}


def encode(message: Message) -> bytes:
    """One line for the socket."""
    return json.dumps({"do": _NAMES[type(message)], **asdict(message)}, default=str).encode() + b"\n"


def decode(line: bytes) -> Message:
    """What `encode` made. Raises ValueError, KeyError or TypeError for anything else."""
    data = json.loads(line)
    do = data.pop("do")
    if do == "close":
        return Close()
    if do == "end":
        return End(**data)
    if do != "begin":
        raise ValueError(f"unknown message {do!r}")
    settings = data.pop("settings")
    wandb = WandbSettings(**{**settings["wandb"], "tags": tuple(settings["wandb"]["tags"])})
    board = TensorboardSettings(**settings["tensorboard"])
    return Begin(settings=TrackingSettings(wandb=wandb, tensorboard=board), **data)
