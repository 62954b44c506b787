"""Where trainers come from: the worker's handle on its server, and the launcher's on the template.

The processes themselves are in `sweeper.trainer.server`. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sweeper import processes
from sweeper.channel import Channel
from sweeper.companion import DATABASE_SECRETS
from sweeper.trainer.run import Spec

MAX_MESSAGE_BYTES = 1 << 16


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server, and so of its trainers, from that of a worker or launcher."""
    fixed = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    # A trainer holds no database password.
    return {**{name: value for name, value in environment.items() if name not in DATABASE_SECRETS}, **fixed}


def num_ranks(config: Mapping[str, Any]) -> int:
    """Processes of one training."""
    launcher = config["launcher"]
    return int(
        launcher.get("ranks_per_worker") or num_nodes(config) * int(launcher.get("tasks_per_node") or 1)
    )


def num_nodes(config: Mapping[str, Any]) -> int:
    """Nodes of one training."""
    return int(config["launcher"].get("nodes") or 1)


def uses_cuda(config: Mapping[str, Any]) -> bool:
    """Whether trainers will use CUDA."""
    launcher = config["launcher"]
    has_gpus = launcher.get("gpus_per_worker") or launcher.get("gpus_per_node")
    return bool(has_gpus) or "cuda" in str(config["trainer"].get("device", ""))


def wants_plain(config: Mapping[str, Any]) -> bool:
    """Whether trainers must be fresh processes: CUDA does not survive a fork, and ranks come from torchrun."""
    return uses_cuda(config) or num_ranks(config) > 1


def _popen(kind: str, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a server process; returns it with our end of its socket.

    HAZARD: call it in the main thread: the process dies with the thread that created it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, processes.signals_held():
        process = subprocess.Popen(
            [sys.executable, "-m", "sweeper.trainer.server", kind, str(theirs.fileno()), str(os.getpid())],
            env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),), start_new_session=True,
        )  # fmt: skip
    return process, ours


class TrainerServer:
    """A worker's server, started when first needed and again when it died.

    Args:
        environment: Of the worker.
        fd: Socket of a warm server that the launcher has ordered for this worker.
    """

    def __init__(self, environment: Mapping[str, str], *, fd: int | None = None) -> None:
        self._environment = environment_of(environment)
        self._kind = "warm"
        self._process: subprocess.Popen[bytes] | None = None
        self._sock = None if fd is None else socket.socket(fileno=fd)
        self._has_trainer = False
        self._status: int | None = None

    def go_plain(self) -> None:
        """From now on start each trainer as a fresh process: it wants CUDA."""
        self._kind = "plain"
        self.stop()

    def start(self) -> None:
        """Start the server unless there is one. Returns at once; it imports torch meanwhile."""
        if self._sock is None:
            self._process, self._sock = _popen(self._kind, self._environment)

    def spawn(self, spec: Spec, log_fd: int) -> tuple[Channel, Channel]:
        """Ask for a trainer, one at a time.

        Returns:
            The worker's ends of the channels of the trainer and of its saver, should it start one.
        """
        data = json.dumps({"spec": asdict(spec)}).encode()
        (ours, theirs), (saver_ours, saver_theirs) = socket.socketpair(), socket.socketpair()
        with theirs, saver_theirs:
            for is_last in (False, True):
                self.start()
                assert self._sock is not None
                try:
                    fds = [theirs.fileno(), log_fd, saver_theirs.fileno()]
                    socket.send_fds(self._sock, [data], fds)
                    break
                except OSError:
                    self.stop()
                    if is_last:
                        ours.close()
                        saver_ours.close()
                        raise
        self._has_trainer, self._status = True, None
        return Channel(ours), Channel(saver_ours)

    def fileno(self) -> int:
        """For a selector: readable when a trainer, or the server, has ended."""
        assert self._sock is not None
        return self._sock.fileno()

    @property
    def has_trainer(self) -> bool:
        """Whether the trainer that was asked for has not ended yet, as far as is known."""
        return self._has_trainer

    def wait(self, *, wait_s: float) -> int | None:
        """The wait status of the trainer, once it and all it started are gone.

        None: it has not ended within `wait_s`, or the server died, and with it the trainer.
        """
        if self._has_trainer and self._sock is not None and select.select([self._sock], [], [], wait_s)[0]:
            self._has_trainer = False
            try:
                data = self._sock.recv(MAX_MESSAGE_BYTES)
            except OSError:
                data = b""
            if data:
                self._status = int(json.loads(data)["status"])
            else:
                self.stop()
        return self._status

    def stop(self) -> None:
        """End the server, and its trainer with it."""
        self._has_trainer = False
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Template:
    """A launcher's process that has torch imported, from which its workers' servers are forked.

    It saves each worker an import; a worker without it starts a server of its own.
    """

    def __init__(self) -> None:
        self._process, self._sock = _popen("template", environment_of(os.environ))

    def order(self, environment: Mapping[str, str]) -> int | None:
        """A socket whose other end a new server will have; None when the template is gone."""
        mine = environment_of(os.environ)
        wanted = environment_of(environment)
        changed = {name: value for name, value in wanted.items() if mine.get(name) != value}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(
                    self._sock, [json.dumps({"environment": changed}).encode()], [theirs.fileno()]
                )
            except OSError:
                ours.close()
                return None
        return ours.detach()

    def stop(self) -> None:
        """End the template; servers live on with their workers."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._sock.close()
