"""The config group `trainer=command`, checked: which program, with which arguments. Data only, no shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sweeper.errors import ConfigError

TARGET = "sweeper.command.train"
ARGUMENTS = "{args}"
"""The element of argv whose place the arguments take; without it they come last."""

_PLACEHOLDER = re.compile(r"\{(name|value)\}")
_STRANGE = re.compile(r"\{(?!name\}|value\})[a-z_]*\}")


@dataclass(frozen=True, slots=True)
class Command:
    """A program and how it is started.

    Attributes:
        argv: The program and its arguments, one a word.
        env: Variables beside the inherited ones; None takes one away.
        cwd: Its current directory; None is the worker's.
        stop_signal: What asks it to stop.
        grace_s: How long it may take to stop, before it is killed.
        total_steps: Where it ends, for those who look on.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None]
    cwd: str | None
    stop_signal: signal.Signals
    grace_s: float
    total_steps: int | None

    @classmethod
    def from_config(cls, trainer: Mapping[str, Any]) -> Command:
        """Read the `trainer` group as a plain dict, with a trial's parameters in place.

        Raises:
            ConfigError: Naming the key, what is wrong with it, and what to do.
        """
        return cls(
            argv=_argv(trainer),
            env=_environment(trainer.get("env") or {}),
            cwd=_optional_text("trainer.cwd", trainer.get("cwd")),
            stop_signal=_signal(trainer.get("stop_signal", "SIGTERM")),
            grace_s=_seconds("trainer.grace_s", trainer.get("grace_s", 15.0)),
            total_steps=_total(trainer.get("total_steps")),
        )

    def program(self, environment: Mapping[str, str]) -> str:
        """The path of the program.

        What is not found on PATH is looked for beside the Python that runs this, so that `python`
        means something in a virtual environment that was not activated.

        Raises:
            ConfigError: There is no such program.
        """
        name = self.argv[0]
        if os.sep in name:
            path = os.path.join(self.cwd or "", name)
            found = path if os.path.isfile(path) and os.access(path, os.X_OK) else None
        else:
            places = [environment.get("PATH", os.defpath), os.path.dirname(sys.executable)]
            found = shutil.which(name, path=os.pathsep.join(places))
        if found is None:
            raise ConfigError(
                f"the program {name!r} of trainer.argv was not found",
                why="there is no such file that can be executed" if os.sep in name else "it is not on PATH",
                do="Name a program that is there; a script needs its interpreter first, e.g. [python, train.py].",
            )
        return os.path.abspath(found)


def _argv(trainer: Mapping[str, Any]) -> tuple[str, ...]:
    argv = trainer.get("argv")
    if not isinstance(argv, list) or not argv:
        raise ConfigError(
            "trainer.argv names no program",
            why=f"it is {argv!r}",
            do="Use a list of the program and its arguments, e.g. trainer.argv=[python,train.py].",
        )
    words = [_text("trainer.argv", word) for word in argv]
    if words.count(ARGUMENTS) > 1:
        raise ConfigError(f"trainer.argv has {ARGUMENTS} more than once", do="Once is enough.")
    arguments = list(_arguments(trainer))
    if ARGUMENTS in words:
        at = words.index(ARGUMENTS)
        return (*words[:at], *arguments, *words[at + 1 :])
    return (*words, *arguments)


def _arguments(trainer: Mapping[str, Any]) -> Iterator[str]:
    """The words that `trainer.args` becomes, in the order of the names. A null is left out."""
    template = trainer.get("arg_format", "--{name} {value}")
    if not isinstance(template, str) or "{value}" not in template or _STRANGE.search(template):
        raise ConfigError(
            f"trainer.arg_format={template!r} cannot be used",
            do="Use e.g. '--{name} {value}', '--{name}={value}' or '{name}={value}'.",
        )
    args = trainer.get("args") or {}
    if not isinstance(args, Mapping):
        raise ConfigError(f"trainer.args={args!r} cannot be used", do="Use names with a value each.")
    for name, value in sorted(_flat("", args)):
        if value is not None:
            yield from _filled(template, name=name, value=_text(f"trainer.args.{name}", value))


def _filled(template: str, **parts: str) -> Iterator[str]:
    """The words of a template. It is split before it is filled: a value with spaces stays one word."""
    for word in template.split():
        yield _PLACEHOLDER.sub(lambda match: parts[match[1]], word)


def _flat(prefix: str, node: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _text(key: str, value: Any) -> str:
    """A plain value as a program reads it: `true`, `0.001`, `adam`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{key}: {value!r} is not one word", do="Use a text or a number; a list as a text, e.g. '[1,2]'."
        )
    text = str(value)
    if "\0" in text:
        raise ConfigError(f"{key}: {value!r} holds a zero byte", do="Leave it out.")
    return text


def _environment(env: Any) -> dict[str, str | None]:
    if not isinstance(env, Mapping):
        raise ConfigError(f"trainer.env={env!r} cannot be used", do="Use names with a value each.")
    for name in env:
        if not name or "=" in str(name) or "\0" in str(name):
            raise ConfigError(f"trainer.env: {name!r} is no name of a variable")
    return {
        str(name): None if value is None else _text(f"trainer.env.{name}", value)
        for name, value in env.items()
    }


def _optional_text(key: str, value: Any) -> str | None:
    return None if value in (None, "") else _text(key, value)


def _signal(name: Any) -> signal.Signals:
    try:
        return signal.Signals[str(name)]
    except KeyError:
        raise ConfigError(
            f"trainer.stop_signal={name!r} is no signal", do="Use e.g. SIGTERM, SIGINT or SIGUSR1."
        ) from None


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 86400:
        raise ConfigError(f"{key}={value!r} is not a number of seconds", do="Use e.g. 15.")
    return float(value)


def _total(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(
            f"trainer.total_steps={value!r} is not a number of steps", do="Use a whole number, or null."
        )
    return value
