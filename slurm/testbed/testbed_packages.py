"""Installs what a testbed needs, from Debian's packages, without starting any of its services."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = (
    *("mariadb-client-core", "mariadb-server-core", "munge", "slurm-client"),
    *("slurm-wlm-mysql-plugin", "slurmctld", "slurmd", "slurmdbd"),
)
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "APT::Install-Recommends=false", "--yes", "--quiet")
POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks this program before a package starts its service. Source: invoke-rc.d(8)."""
KEPT = POLICY.with_name("policy-rc.d.before-testbed")
DENY = (
    f"#!/bin/sh\n# slurm/testbed/install: start no service now; what was here is in {KEPT.name}\nexit 101\n"
)


def missing_packages() -> list[str]:
    """Returns which of the packages are not installed."""
    result = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n", *PACKAGES],
        capture_output=True,
        text=True,
    )
    return [name for name in PACKAGES if f"installed {name}" not in result.stdout.splitlines()]


def install_command() -> int:
    """`slurm/testbed/install`: installs what is missing, or says it and returns 1."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-query") is None:
        return _refused(
            f"this is no Debian: install SLURM with slurmdbd, munge and MariaDB ({', '.join(PACKAGES)} there)"
        )
    if not (missing := missing_packages()):
        return 0
    if os.getuid() != 0:
        return _refused(f"only root can: apt-get install --no-install-recommends {' '.join(missing)}")
    try:
        with _no_service_starts():
            for command in (("update",), ("install", *missing)):
                subprocess.run(
                    [*APT, *command],
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    check=True,
                )
    except subprocess.CalledProcessError as error:
        return _refused(
            f"{' '.join(error.cmd)} failed with exit code {error.returncode}; missing: {' '.join(missing)}"
        )
    return 0


def _refused(why: str) -> int:
    print(f"slurm/testbed/install: {why}", file=sys.stderr)
    return 1


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Forbids packages to start services; puts the machine's own policy back, also that of a killed install."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _restore_policy()
        if POLICY.exists():
            POLICY.rename(KEPT)
        POLICY.write_text(DENY)
        POLICY.chmod(0o755)
        try:
            yield
        finally:
            _restore_policy()


def _restore_policy() -> None:
    if KEPT.exists():
        KEPT.replace(POLICY)
    elif POLICY.exists() and POLICY.read_text() == DENY:
        POLICY.unlink()
