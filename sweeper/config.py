"""The composed configuration as plain values: freeze, apply a trial's parameters, write."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from sweeper.errors import ConfigError
from sweeper.records import Params, ParamValue

_PLAIN_TEXT = re.compile(r"(?!(?:[yY]|[nN]|[oO][nN]|[oO][fF][fF]|nan|inf)\Z)[A-Za-z_][A-Za-z_.-]*\Z")

LAUNCH_ONLY = ("space", "stop_at", "command")
"""Keys that a launch adds to the stored configuration; a run's config.yaml has no use for them."""


def for_run(config: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The configuration of one trial: the sweep's, with the trial's parameters put in place."""
    result = copy.deepcopy({key: value for key, value in config.items() if key not in LAUNCH_ONLY})
    for key, value in params.items():
        put(result, key, value)
    return result


FROM_LAUNCH = ("launcher", "tracking", "storage", "resume", "retry", "lease", "mirror", "data_dir")
"""What a resumed run takes from the new launch; everything else is its own."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a resumed run keeps although today's launch says otherwise: `key: its own (today …)`."""
    own, today = dict(_flat("", before)), dict(_flat("", after))
    return [
        f"{key}: {own.get(key)} (today {today.get(key)})"
        for key in sorted(set(own) | set(today))
        if own.get(key) != today.get(key) and not key.startswith((*FROM_LAUNCH, "sweep."))
    ]


def _flat(prefix: str, node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [item for key, value in node.items() for item in _flat(f"{prefix}{key}.", value)]
    return [(prefix.rstrip("."), node)]


def put(config: dict[str, Any], key: str, value: ParamValue) -> None:
    """Set a dotted key that exists already. Raises ConfigError, naming what there is instead."""
    node, last = check_key(config, key)
    node[last] = value


def check_key(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a dotted key, and the key's last part.

    Raises:
        ConfigError: There is no such key, or it is no plain value.
    """
    *parents, last = key.split(".")
    node: Any = config
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        there = ", ".join(sorted(map(str, node))) if isinstance(node, dict) else "nothing"
        raise ConfigError(
            f"the parameter {key} is not in the configuration",
            why=f"there is {there}",
            do="Correct sweep.params, or add the key to the trainer's configuration.",
        )
    if isinstance(node[last], dict):
        raise ConfigError(
            f"the parameter {key} is a group of settings, not a value", do="Search over the values in it."
        )
    return node, last


def to_yaml(config: Mapping[str, Any]) -> bytes:
    """YAML that OmegaConf reads back to the same values."""
    import yaml

    text: str = yaml.dump(dict(config), Dumper=_dumper(), sort_keys=True, allow_unicode=True, width=1000)
    return text.encode()


@cache
def _dumper() -> Any:
    """A dumper that quotes what might be read as something other than text; PyYAML overlooks `1e-5`."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        pass

    def text(dumper: Any, value: str) -> Any:
        style = None if _PLAIN_TEXT.match(value) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return Dumper
