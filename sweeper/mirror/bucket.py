"""An object store through fsspec: flat names below one URL, and objects that are created only once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from sweeper.errors import ConfigError

KNOWN = ("file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Kinds of stores whose fsspec back end creates an object only if there is none, in one request.

Source: `_pipe_file(mode="create")` of s3fs 2026.9 (If-None-Match), gcsfs 2026.10 (ifGenerationMatch), adlfs
2026.8 (overwrite=False). fsspec's default looks first and then writes, which two machines can do at once.
"""

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_NOT_CONDITIONAL = "Use a directory, S3, Google Cloud Storage or Azure: two machines must never both believe that the copy is theirs."
_CHUNK_BYTES = 1 << 20


class Bucket:
    """All objects below one URL. Names are relative; whatever fails raises OSError."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs, self._root = filesystem, root.rstrip("/")
        self._is_local = "file" in _protocols(filesystem)

    @classmethod
    def open(cls, url: str, *parts: str) -> Bucket:
        """The store at `url`; credentials come from its client's own environment.

        Raises:
            ConfigError: The kind of store is not known, or its package is not installed.
            OSError: It refuses.
        """
        from fsspec.core import url_to_fs

        kind = url.partition("://")[0]
        if kind not in KNOWN:
            raise ConfigError(
                f"mirror.url: {kind}:// cannot create an object conditionally", do=_NOT_CONDITIONAL
            )
        try:
            # Cached listings would hide what another machine has done.
            filesystem, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            package = _PACKAGES.get(kind, kind)
            extra = "sweeper[s3]" if package == "s3fs" else package
            raise ConfigError(
                f"mirror.url: {kind}:// needs the package {package}", do=f"pip install '{extra}'."
            ) from error
        except ValueError as error:
            raise ConfigError("mirror.url cannot be used", why=str(error)) from error
        return cls(filesystem, "/".join([root.rstrip("/"), *parts]))

    def probe(self) -> None:
        """Create an object twice; the second time must fail.

        Raises:
            ConfigError: It did not.
            OSError: The store cannot be written.
        """
        name = f"probes/{secrets.token_hex(8)}.json"
        self.create(name, b"{}")
        try:
            self.create(name, b"{}")
        except FileExistsError:
            return
        finally:
            with contextlib.suppress(OSError):
                self.delete(name)
        raise ConfigError(
            "mirror.url: this store does not honour conditional writes",
            why="it let the same object be created twice",
            do=_NOT_CONDITIONAL,
        )

    # --- writing -------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Create an object, atomically, if there is none; else FileExistsError.

        HAZARD: a client that repeats a request whose answer was lost may be told that its own object
        exists: read it back.
        """
        with _as_os_error():
            if self._is_local:
                self._make_parent(name)
                with open(self._path(name), "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                self._fs.pipe_file(self._path(name), data, mode="create")

    def write(self, name: str, data: bytes) -> None:
        """Put an object. HAZARD: on a file system not atomically; a reader may see a part of it."""
        with _as_os_error():
            self._make_parent(name)
            self._fs.pipe_file(self._path(name), data)

    def upload(self, name: str, fd: int) -> None:
        """Put an open file, whatever has become of its name."""
        with _as_os_error():
            self._make_parent(name)
            self._fs.put_file(f"/proc/self/fd/{fd}", self._path(name))

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        with _as_os_error(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    # --- reading -------------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """The names below a prefix that ends at a `/`, sorted; what others wrote is seen at once."""
        with _as_os_error():
            try:
                found = self._fs.find(self._path(prefix))
            except FileNotFoundError:
                return []
        return sorted(path[len(self._root) + 1 :] for path in found if path.startswith(f"{self._root}/"))

    def exists(self, name: str) -> bool:
        """Whether there is such an object, asked anew each time. OSError when the store does not say."""
        with _as_os_error():
            try:
                self._fs.info(self._path(name))
            except FileNotFoundError:
                return False
        return True

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """A small object. Raises FileNotFoundError, or OSError when it is larger than that."""
        with _as_os_error(), self._fs.open(self._path(name), "rb") as file:
            data: bytes = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise OSError(f"{name} has more than {limit_bytes} bytes")
        return data

    def read_json(self, name: str, *, limit_bytes: int) -> dict[str, Any]:
        """A JSON object; what is not one is `{}`. Raises as `read`."""
        try:
            value = json.loads(self.read(name, limit_bytes=limit_bytes))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def download(self, name: str, target: Path, *, limit_bytes: int) -> None:
        """Write an object to the new file `target`. Raises FileNotFoundError when there is none."""
        with _as_os_error(), self._fs.open(self._path(name), "rb") as source, open(target, "xb") as file:
            left = limit_bytes + 1  # one more, so that too long a file is seen to be
            while left and (data := source.read(min(left, _CHUNK_BYTES))):
                file.write(data)
                left -= len(data)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        if self._is_local:
            os.makedirs(os.path.dirname(self._path(name)), mode=0o700, exist_ok=True)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


@contextlib.contextmanager
def _as_os_error() -> Any:
    """Foreign clients raise what they like; everything that is no OSError becomes one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())[:500]) from error
