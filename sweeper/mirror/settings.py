"""The config group `mirror`, checked. Nothing here imports fsspec."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from sweeper.errors import ConfigError

_SECRET = re.compile(r"key|token|secret|passw|credential|signature|^sig$|sas", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """mirror.*

    Attributes:
        url: Where run directories are copied, an fsspec URL; None: nowhere.
        every_s: A run that goes on is copied no more often than that. What is final goes at once.
        finish_timeout_s: How long a worker that ends waits for what is still to be copied.
    """

    url: str | None = None
    every_s: float = 10.0
    finish_timeout_s: float = 60.0

    @property
    def is_enabled(self) -> bool:
        """Whether anything is copied."""
        return self.url is not None

    @classmethod
    def from_config(cls, mirror: Mapping[str, Any] | None) -> MirrorSettings:
        """Read the group as a plain dict; without one, as sweeps of older versions have none, it is off.

        Raises:
            ConfigError: A value cannot be used.
        """
        given = dict(mirror or {})
        if unknown := sorted(set(given) - {"url", "every_s", "finish_timeout"}):
            raise ConfigError(f"mirror.{unknown[0]} is not known", do="It has url, every_s, finish_timeout.")
        return cls(
            url=check_url(given.get("url")),
            every_s=_seconds("mirror.every_s", given.get("every_s"), default=10.0),
            finish_timeout_s=_seconds("mirror.finish_timeout", given.get("finish_timeout"), default=60.0),
        )


def check_url(url: Any) -> str | None:
    """The URL as it is used: a local path absolute, without a slash at its end; None for none.

    Raises:
        ConfigError: It holds a password, or is of a kind that cannot be used.
    """
    if url in (None, ""):
        return None
    if not isinstance(url, str) or not url.isprintable() or "::" in url:
        raise ConfigError("mirror.url is not a URL", do="Use e.g. s3://bucket/prefix, or a directory.")
    if "://" not in url:
        return f"file://{os.path.abspath(os.path.expanduser(url))}"
    parts = urlsplit(url)
    if parts.password is not None or "@" in parts.netloc:
        raise ConfigError(
            "mirror.url holds a name or password",
            do="Give it to the store's own client: environment variables or its configuration file.",
        )
    if bad := [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)]:
        raise ConfigError(
            f"mirror.url has the parameter {bad[0]!r}", do="Give secrets to the store's own client instead."
        )
    if parts.scheme == "file":
        return f"file://{os.path.abspath(parts.netloc + parts.path)}"
    if parts.scheme == "memory":
        raise ConfigError("mirror.url: what is in a process's memory is lost with it", do="Use a real store.")
    return url.rstrip("/")


def _seconds(key: str, value: Any, *, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 86400:
        raise ConfigError(f"{key}={value!r} is not a number of seconds", do="Use e.g. 30.")
    return float(value)
