"""`checkpoint.*`: what may be said there, in a sweep and to `open_run` alike."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from sweeper.errors import ConfigError

DEFAULTS: dict[str, Any] = {
    "every_n_steps": None, "every_s": 60.0, "at_epoch_end": False, "interval": None, "async_save": True,
    "keep_last": 3, "keep_best": 0, "keep_every_n_steps": 0, "export_weights": None,
}  # fmt: skip
"""All settings, with the values they have for `open_run`."""
OWN_FIELDS = ("stage", "run_id", "trial")
"""What `export_weights` may name beside the training's own configuration."""

Rule = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any, *, least: int) -> bool:
    return type(value) is int and value >= least


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_BOOLEAN: Rule = (lambda value: isinstance(value, bool), "Use true or false.")
_NUMBER: Rule = (lambda value: _is_whole(value, least=0), "Use a whole number, 0 for none.")
_RULES: dict[str, Rule] = {
    "every_n_steps": (
        lambda value: value is None or _is_whole(value, least=1),
        "Use a number of steps, at least 1, or null.",
    ),
    "every_s": (lambda value: value is None or _is_seconds(value), "Use a number of seconds, more than 0, or null."),
    "at_epoch_end": _BOOLEAN,
    "interval": (lambda value: value in (None, "auto"), "Use auto or null."),
    "async_save": _BOOLEAN,
    "keep_last": (
        lambda value: _is_whole(value, least=2),
        "Use at least 2: one may turn out to be damaged.",
    ),
    "keep_best": _NUMBER,
    "keep_every_n_steps": _NUMBER,
    "export_weights": (
        lambda value: value is None or (isinstance(value, str) and value.endswith((".pth", ".pt"))),
        "Use a path such as out/{stage}.pth, or null.",
    ),
}  # fmt: skip


def check(
    settings: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    num_trials: int = 1,
    prefix: str = "checkpoint.",
) -> None:
    """Refuse what could only fail, or do nothing, later.

    Args:
        config: The training's configuration, whose keys `export_weights` may name.
        num_trials: How many trainings have these settings.
        prefix: What the user writes before their names.

    Raises:
        ConfigError: Naming the setting and what would do.
    """
    if unknown := sorted(set(settings) - set(_RULES)):
        raise ConfigError(f"there is no setting {prefix}{unknown[0]}", do=f"There are {', '.join(_RULES)}.")
    for name, value in settings.items():
        is_good, advice = _RULES[name]
        if not is_good(value):
            raise ConfigError(f"{prefix}{name}={value!r} cannot be used", do=advice)
    if pattern := settings.get("export_weights"):
        _check_pattern(f"{prefix}export_weights", pattern, config=config, num_trials=num_trials)


def _check_pattern(name: str, pattern: str, *, config: Mapping[str, Any], num_trials: int) -> None:
    known = sorted({*OWN_FIELDS, *map(str, config)})
    try:
        parsed = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise ConfigError(
            f"{name}={pattern!r} cannot be used", why=str(error), do="Close its braces."
        ) from error
    fields = {field.partition(".")[0].partition("[")[0] for field in parsed}
    if unknown := sorted(fields - set(known)):
        raise ConfigError(
            f"{name}={pattern!r} names {unknown[0]!r}, which is not there",
            do=f"It may name {', '.join(known)}.",
        )
    if num_trials > 1 and _leads_outside(pattern, config) and not fields & {"run_id", "trial"}:
        raise ConfigError(
            f"{name}={pattern!r} is one file for all trials, each of which would replace it",
            do="Put {trial} or {run_id} into it, or use a path in the run directory.",
        )


def _leads_outside(pattern: str, config: Mapping[str, Any]) -> bool:
    """Whether a file would lie outside of the run directory."""
    try:
        path = pattern.format(**{**config, **dict.fromkeys(OWN_FIELDS, "x")})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        path = pattern  # it is filled in, or refused, when the training starts
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts
