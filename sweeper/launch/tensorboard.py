"""TensorBoard beside a sweep: the real program, started by a launcher and ended with it.

It shows the event files below `tracking.tensorboard.dir` ($TF_DIR) and has no part in the sweep:
whatever is wrong with it is one line in the launcher's log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sweeper import processes
from sweeper.companion import DATABASE_SECRETS
from sweeper.errors import ConfigError

# -P: a tensorboard.py in the current directory is not what is meant.
PROGRAM = ("-P", "-m", "tensorboard.main")
NICENESS = 10
END_WAIT_S = 1.0
MAX_STARTS = 3
_NEIGHBOURS = 20
_MAX_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BoardSettings:
    """What `tracking.tensorboard` says about the program; what it says about event files is the tracker's.

    Attributes:
        dir: Root of all event files, None if each run has its own.
        is_auto: Whether a launcher starts the program.
        port: Where it listens, if that is free; 0 is any.
    """

    dir: str | None = None
    is_auto: bool = True
    port: int = 6006
    host: str = "localhost"

    @property
    def is_wanted(self) -> bool:
        """Whether there is a place that all runs write to, and somebody wants to see it."""
        return self.dir is not None and self.is_auto

    @classmethod
    def from_config(cls, tracking: Mapping[str, Any]) -> BoardSettings:
        """Read `tensorboard.{enabled,dir,auto,port,host}` of `cfg.tracking`; absent keys keep their defaults.

        Raises:
            ConfigError: A value cannot be used.
        """
        board = {
            key: value for key, value in (tracking.get("tensorboard") or {}).items() if value is not None
        }
        auto, port, host = board.get("auto", 1), board.get("port", 6006), board.get("host", "localhost")
        if auto not in (0, 1):  # True and False are among them
            raise ConfigError(
                f"tracking.tensorboard.auto={auto!r} cannot be used", do="Use 1 or 0, or true or false."
            )
        if type(port) is not int or not 0 <= port < 1 << 16:
            raise ConfigError(
                f"tracking.tensorboard.port={port!r} is not a port",
                do="Use e.g. 6006, or 0 for any free one.",
            )
        if not isinstance(host, str) or not host:
            raise ConfigError(
                f"tracking.tensorboard.host={host!r} is not a host", do="Use e.g. localhost or 0.0.0.0."
            )
        is_written = board.get("enabled", True) is True
        return cls(str(board["dir"]) if board.get("dir") else None, bool(auto) and is_written, port, host)


class Board:
    """The program of one launch; as a context manager it ends with the block.

    HAZARD: for the launcher's main thread, and before it has another: the process dies with the
    thread that created it.

    Args:
        settings: What to show, and where.
        say: Prints one line for people.
    """

    def __init__(self, settings: BoardSettings, *, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Any = None
        self._port = 0
        self._num_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            death = os.pidfd_open(self._process.pid)
            select.select([death], [], [], END_WAIT_S)
            os.close(death)
            self._end(self._process)

    def start(self) -> None:
        """Start it, if it is wanted, and say where it shows what. It imports for seconds, beside us."""
        if self._settings.is_wanted:
            self._start()

    def look(self) -> None:
        """Say so when it has ended. Start it again if somebody else had taken its port first."""
        if self._process is None or not processes.has_ended(self._process):
            return
        port, said = self._port, self._last_words()
        why = processes.ending_of(self._end(self._process)) + said
        if self._num_starts < MAX_STARTS and _is_taken(port):
            self._start()
        else:
            self._warn(f"ended ({why}); `tensorboard --logdir {self._settings.dir}` starts it again")

    def _start(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            self._warn("it is not installed; `pip install tensorboard`, or TB_AUTO=0")
            return
        try:
            self._spawn(Path(os.path.abspath(str(self._settings.dir))))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._warn(f"it cannot be started: {error}")

    def _spawn(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        host = self._settings.host
        try:
            self._port = free_port(host, self._settings.port)
        except OSError as error:
            self._warn(
                f"it cannot listen on the host {host!r} ({error.strerror or error}); "
                "set TB_HOST, or tracking.tensorboard.host, to one of this machine, e.g. localhost"
            )
            return
        self._num_starts += 1
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        environment = {name: value for name, value in os.environ.items() if name not in DATABASE_SECRETS}
        self._process = subprocess.Popen(
            [sys.executable, *PROGRAM, "--logdir", str(directory), "--host", host, "--port", str(self._port)],
            env=environment, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            start_new_session=True, preexec_fn=processes.bound_to(os.getpid(), niceness=NICENESS),
        )  # fmt: skip
        address = f"[{host}]" if ":" in host else host
        self._say(f"[TENSORBOARD] http://{address}:{self._port}/ (pid {self._process.pid}) shows {directory}")

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """End what is left of it, its data server too; returns the return code."""
        self._process = None
        self._output.close()
        return processes.kill_group(process)

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _MAX_TAIL_BYTES))
        lines = self._output.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {said[:300]}" if said else ""

    def _warn(self, text: str) -> None:
        self._say(f"[TENSORBOARD] no TensorBoard beside this sweep: {text}")


def free_port(host: str, wanted: int) -> int:
    """The port that is wanted, else the next free one, else any.

    Raises:
        OSError: There is no such host on this machine.
    """
    for port in range(wanted, min(wanted + _NEIGHBOURS, 1 << 16)) if wanted else ():
        if _is_free(host, port):
            return port
    with _bound(host, 0) as sock:
        return int(sock.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    if _is_taken(port):
        return False
    try:
        with _bound(host, port):
            return True
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise
        return False


def _is_taken(port: int) -> bool:
    """TensorBoard takes a port for used when somebody answers there on localhost, whatever its host."""
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as its server does
        sock.bind(address)
        yield sock
