"""Whether a process is gone for certain; read from /proc with nothing but `os`.

Apart from `sweeper.processes`, so that `sweeper list` can judge leases without importing
sockets, ctypes and dataclasses.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Identity(Protocol):
        """What identifies a process; `sweeper.records.ProcessId` does."""

        @property
        def host(self) -> str: ...
        @property
        def machine_id(self) -> str: ...
        @property
        def boot_id(self) -> str: ...
        @property
        def pid_namespace(self) -> str: ...
        @property
        def uid(self) -> int: ...
        @property
        def pid(self) -> int: ...
        @property
        def start_ticks(self) -> int: ...


def boot_id() -> str:
    """The kernel's id of this boot; the same in every container of the machine."""
    return _read("/proc/sys/kernel/random/boot_id")


def host() -> str:
    """The name of this machine or container."""
    return os.uname().nodename


def machine_id() -> str:
    """An id of this machine that survives a reboot."""
    return _read("/etc/machine-id") or _read("/var/lib/dbus/machine-id") or host()


def pid_namespace() -> str:
    """The PID namespace of this process, in which its pids mean something."""
    return os.readlink("/proc/self/ns/pid")


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks after boot; None if it is gone or a zombie.

    Source: proc(5), fields 3 and 22 of /proc/PID/stat, counted after the last parenthesis.
    """
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def proof_of_death(process: Identity) -> str | None:
    """Why `process` is gone for certain, or None when that cannot be proved from here."""
    if process.boot_id != boot_id():
        same_machine = process.machine_id == machine_id() and process.host == host()
        return "this machine has rebooted since" if same_machine else None
    if process.pid_namespace != pid_namespace() or process.uid != os.getuid():
        return None
    if start_ticks(process.pid) == process.start_ticks:
        return None
    # HAZARD: with hidepid an unreadable /proc entry is no proof; kill(2) with signal 0 is.
    if start_ticks(process.pid) is None and _exists(process.pid) and not _is_zombie(process.pid):
        return None
    return f"its process {process.pid} is gone"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_zombie(pid: int) -> bool:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] in "ZX"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
