"""A real SLURM cluster on one machine, without systemd, below one directory: for tests and for trying things out.

munged, MariaDB's server core, slurmdbd, slurmctld and one slurmd for each fake node run on private ports and
sockets, bound to loopback, as the user who asks. Only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import pwd
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import testbed_files
from testbed_processes import Process, find_processes, kill

PROGRAMS = (
    *("munged", "mariadbd", "mariadb-install-db", "my_print_defaults", "slurmdbd", "slurmctld", "slurmd"),
    *("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"),
)
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
"""Where the programs are looked for: daemons are often not on an ordinary user's PATH."""
TIMEOUT_S = 60
"""How long a daemon may take to answer, or to die, on a busy machine."""
PORTS_PER_TESTBED = 16
MAX_NODES = PORTS_PER_TESTBED - 2
PORTS = range(12_000, 32_000, PORTS_PER_TESTBED)
"""First ports, all below those that Linux gives to outgoing connections (32768 and up)."""
SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path. Source: unix(7), `sun_path` less its closing NUL."""
FOLDERS = ("etc", "gpu", "log", "mysql", "run", "spool", "state", "tmp")


class TestbedError(Exception):
    """The cluster cannot be brought up or does not do what was asked: the text says why and where to look."""

    __test__ = False  # pytest would collect it for its name


def missing_programs() -> list[str]:
    """Returns the names of the programs that a testbed needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def default_dir() -> Path:
    """Returns where a user's testbed lives when no directory is named."""
    return Path(tempfile.gettempdir()) / f"slurm-testbed-{os.getuid()}"


class Testbed:
    """One SLURM cluster below one directory; another process can hold the same one by naming its directory."""

    __test__ = False  # pytest would collect it for its name

    def __init__(self, dir: Path | str, *, num_nodes: int = 4, send_user_signal: bool = False) -> None:
        """Names a testbed; nothing happens yet.

        Args:
            dir: Where all of it lives. `up` makes it, or takes an empty one or one that a testbed left.
            num_nodes: Fake nodes, called n1, n2, …
            send_user_signal: Preemption sends a job's `--signal`, not SIGTERM (preempt_send_user_signal).
        """
        self.dir = Path(os.path.realpath(dir))
        self.nodes = tuple(f"n{index}" for index in range(1, num_nodes + 1))
        self.cluster = f"testbed_{hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:12]}"
        self._send_user_signal = send_user_signal
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need in their environment to reach this cluster."""
        return {"SLURM_CONF": str(self.dir / "etc/slurm.conf")}

    @property
    def pids(self) -> dict[str, int]:
        """Daemon (or node, for a slurmd) → pid, of those that live."""
        return {process.name: process.pid for process in self.processes() if process.name is not None}

    def processes(self) -> list[Process]:
        """Returns every living process of this testbed: daemons, steps and jobs."""
        return find_processes(self.dir, self.cluster)

    def run(self, *command: str) -> str:
        """Runs one of SLURM's commands against this cluster and returns what it printed.

        Raises:
            TestbedError: It failed; with what it said.
        """
        result = self._run(*command)
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip()
            raise TestbedError(f"{' '.join(command)} failed with exit code {result.returncode}: {said}")
        return result.stdout.strip()

    def up(self) -> None:
        """Brings the cluster up; returns when its nodes are idle and take jobs.

        Raises:
            TestbedError: It could not; nothing is left running.
        """
        if missing := missing_programs():
            raise TestbedError(f"not installed: {', '.join(missing)} (slurm/testbed/install gets them)")
        address = _loopback_address()
        with self._locked(), _free_ports(address) as first_port:
            if pids := [str(process.pid) for process in self.processes()]:
                raise TestbedError(
                    f"{self.dir} has a running testbed (pids {', '.join(pids)}): end it with down"
                )
            try:
                self._write_files(first_port, address)
                self._start_all()
            except BaseException:
                self._kill(self.processes)
                raise

    def down(self) -> None:
        """Ends every process of this testbed, jobs included, however much of it runs; keeps its files."""
        with self._locked() if self.dir.is_dir() else nullcontext():
            self._kill(self.processes)

    def kill_node(self, name: str, *, tasks: bool = True) -> None:
        """Kills a node's slurmd with SIGKILL; with `tasks`, its step daemons and what runs there as well.

        Without `tasks` the controller loses the node while its tasks go on, as behind a broken network.
        """
        self._kill(lambda: [p for p in self.processes() if (p.node if tasks else p.name) == name])

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd; returns when it listens and the controller counts on it."""
        slurmd = self._start_slurmd(name)
        fields = dict(
            field.partition("=")[::2] for field in self.run("scontrol", "-o", "show", "node", name).split()
        )
        # Its state alone says nothing: a node is "idle" for some time after it was lost.
        self._await(name, slurmd, lambda: _silence((fields["NodeAddr"], int(fields["Port"]))))
        self._await(name, slurmd, lambda: self._unusable([name], {"idle", "mixed", "allocated"}))

    def kill_controller(self) -> None:
        """Kills slurmctld with SIGKILL."""
        self._kill(lambda: [process for process in self.processes() if process.name == "slurmctld"])

    def start_controller(self) -> None:
        """Starts slurmctld with the state it had; returns when it answers."""
        slurmctld = self._start("slurmctld", "slurmctld", "-D")
        self._await("slurmctld", slurmctld, lambda: self._refusal("scontrol", "ping"))

    def restart_controller(self) -> None:
        """Ends slurmctld with SIGTERM, so that it saves its state, and starts it again."""
        pid = self.pids["slurmctld"]
        os.kill(pid, signal.SIGTERM)
        self._await(
            "slurmctld", None, lambda: f"pid {pid} is not ended" if pid in self.pids.values() else None
        )
        self.start_controller()

    def reset(self) -> None:
        """Starts the controller and nodes that were killed, ends all jobs; returns when every node is idle."""
        living = self.pids
        if "slurmctld" not in living:
            self.start_controller()
        for node in self.nodes:
            if node not in living:
                self.start_node(node)
        self.run("scancel", f"--user={_user()}")
        self._await(
            "slurmctld",
            None,
            lambda: self.run("squeue", "--noheader") or self._unusable(self.nodes, {"idle"}),
        )
        # A task whose step daemon was killed is not known to SLURM any more.
        self._kill(lambda: [process for process in self.processes() if process.node and process.name is None])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the directory against another `up` or `down`; the kernel lets go of it at our end."""
        self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (owner := self.dir.stat().st_uid) != os.getuid():
            raise TestbedError(f"{self.dir} belongs to user {owner}: name another directory")
        with open(self.dir / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TestbedError(f"another up or down is at work in {self.dir}") from None
            yield

    def _write_files(self, first_port: int, address: str) -> None:
        """Writes every file anew; what an earlier testbed left in the directory goes."""
        if strangers := {entry.name for entry in self.dir.iterdir()} - {*FOLDERS, "lock"}:
            raise TestbedError(
                f"{self.dir} has files of something else ({min(strangers)}): name another directory"
            )
        if not re.fullmatch(r"[\w./+-]+", str(self.dir)):
            raise TestbedError(f"{self.dir}: SLURM's files cannot hold a path with such characters")
        if len(f"{self.dir}/run/mariadb.socket") > SOCKET_PATH_MAX:
            raise TestbedError(f"{self.dir}: too long for the path of a socket; name a shorter one")
        self.dir.chmod(0o700)
        for name in FOLDERS:
            shutil.rmtree(self.dir / name, ignore_errors=True)
        for name in (*FOLDERS, *(f"spool/{node}" for node in self.nodes)):
            (self.dir / name).mkdir(mode=0o700)
        for index in range(testbed_files.GPUS_PER_NODE):  # any character device whose name ends in a number
            (self.dir / f"gpu/gpu{index}").symlink_to("/dev/null")
        layout = testbed_files.Layout(
            dir=self.dir,
            cluster=self.cluster,
            nodes=self.nodes,
            host=socket.gethostname().partition(".")[0],
            address=address,
            first_port=first_port,
            user=_user(),
            version=_slurm_version(),
            send_user_signal=self._send_user_signal,
        )
        for name, text in {**testbed_files.texts(layout), "munge.key": secrets.token_hex(64)}.items():
            with open(
                os.open(self.dir / "etc" / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w"
            ) as file:
                file.write(text)

    def _start_all(self) -> None:
        """Starts each daemon once what it needs answers."""
        munge_socket, mariadb_socket = self.dir / "run/munge.socket", self.dir / "run/mariadb.socket"
        mariadb = (
            "--no-defaults",
            "--innodb-log-file-size=8M",
            f"--datadir={self.dir}/mysql",
            f"--user={_user()}",
        )
        munged = self._start(
            *("munged", "munged", "--foreground", "--force", f"--socket={munge_socket}"),
            *(f"--key-file={self.dir}/etc/munge.key", f"--pid-file={self.dir}/run/munged.pid"),
            f"--seed-file={self.dir}/state/munge.seed",
        )
        install = self._start(
            *("mariadb-install-db", "mariadb-install-db", *mariadb, "--skip-test-db"),
            *("--auth-root-authentication-method=socket", f"--auth-root-socket-user={_user()}"),
        )
        if install.wait() != 0:
            raise self._error("mariadb-install-db", f"failed with exit code {install.returncode}")
        mariadbd = self._start(
            *("mariadbd", "mariadbd", *mariadb, f"--socket={mariadb_socket}", "--skip-networking"),
            *(f"--pid-file={self.dir}/run/mariadbd.pid", "--innodb-flush-log-at-trx-commit=0"),
        )
        self._await("munged", munged, lambda: _silence(munge_socket))
        self._await("mariadbd", mariadbd, lambda: _silence(mariadb_socket))
        slurmdbd = self._start("slurmdbd", "slurmdbd", "-D")
        self._await("slurmdbd", slurmdbd, lambda: self._refusal("sacctmgr", "-n", "show", "cluster"))
        self.start_controller()
        # A slurmd that finds no controller waits long before it asks again, so they come last.
        for node in self.nodes:
            self._start_slurmd(node)
        self._await("slurmctld", None, lambda: self._unusable(self.nodes, {"idle"}))

    def _start_slurmd(self, node: str) -> subprocess.Popen[bytes]:
        return self._start(node, "slurmd", "-D", "-N", node, cwd=self.dir / "spool" / node)

    def _start(self, name: str, *command: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts a program in a session of its own; what it prints goes to log/NAME.out."""
        variables = {
            "MARIADB_UNIX_PORT": f"{self.dir}/run/mariadb.socket",
            "SLURM_CLUSTER_NAME": self.cluster,
        }
        # HAZARD: a MariaDB that starts removes what another one has just put into a temporary directory of both.
        variables["TMPDIR"] = f"{self.dir}/tmp"
        # HAZARD: a daemon that held our standard output would keep `eval "$(up)"` waiting for ever.
        with open(self.dir / f"log/{name}.out", "ab") as out:
            child = subprocess.Popen(
                command,
                executable=shutil.which(command[0], path=SEARCH_PATH),
                cwd=cwd or self.dir / "run",
                env={**_clean_environment(), **self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def _kill(self, find: Callable[[], list[Process]]) -> None:
        try:
            kill(find, timeout_s=TIMEOUT_S)
        except TimeoutError as error:
            raise TestbedError(str(error)) from None
        self._children = [child for child in self._children if child.poll() is None]

    def _await(
        self, name: str, child: subprocess.Popen[bytes] | None, why_not: Callable[[], str | None]
    ) -> None:
        """Returns when there is no reason why not; raises when `child` ends first, or when it takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while (reason := why_not()) is not None:
            if child is not None and child.poll() is not None:
                raise self._error(name, f"ended with exit code {child.returncode}")
            if time.monotonic() > deadline:
                raise self._error(name, f"is not ready after {TIMEOUT_S} s ({reason})")
            time.sleep(0.02)

    def _error(self, name: str, what: str) -> TestbedError:
        """Returns what went wrong with a daemon, with the end of its log."""
        log = self.dir / f"log/{name}.out"
        return TestbedError(
            "\n  ".join([f"{name} {what}; {log} ends:", *log.read_text(errors="replace").splitlines()[-8:]])
        )

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        executable, environment = (
            shutil.which(command[0], path=SEARCH_PATH),
            _clean_environment() | self.environment,
        )
        return subprocess.run(
            command,
            executable=executable,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def _refusal(self, *command: str) -> str | None:
        """Returns what a failing command of SLURM says; None if it succeeds."""
        result = self._run(*command)
        return None if result.returncode == 0 else (result.stderr or result.stdout).strip()

    def _unusable(self, nodes: Sequence[str], good: set[str]) -> str | None:
        """Returns the nodes whose state is not a good one; SLURM marks states, like "idle*" for a silent node."""
        lines = self._run("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T").stdout.splitlines()
        bad = sorted({line for line in lines if line.split()[1] not in good})
        return None if lines and not bad else f"nodes: {', '.join(bad) or 'none'}"


def _silence(address: Path | tuple[str, int]) -> str | None:
    """Returns a text if no server listens there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as client:
        failed = client.connect_ex(str(address) if isinstance(address, Path) else address)
    return f"{address}: {os.strerror(failed)}" if failed else None


def _clean_environment() -> dict[str, str]:
    """Returns what daemons and commands may know of ours: no secrets, and nothing of another cluster."""
    names = ("HOME", "LANG", "LC_ALL", "LOGNAME", "TZ", "USER")
    return {"PATH": SEARCH_PATH, **{name: os.environ[name] for name in names if name in os.environ}}


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _slurm_version() -> tuple[int, int]:
    """Returns year and month of the installed SLURM, like (22, 5)."""
    slurmctld = shutil.which("slurmctld", path=SEARCH_PATH)
    text = subprocess.run([slurmctld or "slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    if (found := re.search(r"(\d+)\.(\d+)", text)) is None:
        raise TestbedError(f"slurmctld -V printed no version: {text!r}")
    return int(found[1]), int(found[2])


def _loopback_address() -> str:
    """Returns the address of this machine's own name, which is the one that SLURM binds to, if it is loopback."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        address = str(error)
    if not address.startswith("127."):
        raise TestbedError(
            f"SLURM listens at the address of this machine's own name, and that of {host} is not loopback "
            f"({address}): write '127.0.1.1 {host}' into /etc/hosts"
        )
    return address


@contextmanager
def _free_ports(address: str) -> Iterator[int]:
    """Yields the first of a block of free ports, and keeps every other `up` from taking it in the meantime."""
    for first in random.sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0slurm-testbed-ports-{first}")
            except OSError:
                continue
            if all(_silence((address, port)) for port in range(first, first + PORTS_PER_TESTBED)):
                yield first
                return
    raise TestbedError(f"no {PORTS_PER_TESTBED} free ports in a row between {PORTS.start} and {PORTS.stop}")


def _parser(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--dir", type=Path, default=default_dir(), help="where all of it lives (%(default)s)")
    return parser


def _reported(command: str, act: Callable[[], None]) -> int:
    """Returns a command's exit code; what went wrong is told on standard error."""
    try:
        act()
    except TestbedError as error:
        print(f"slurm/testbed/{command}: {error}", file=sys.stderr)
        return 1
    return 0


def up_command() -> int:
    """`slurm/testbed/up`: prints the environment to use, for `eval`."""
    parser = _parser('Bring up a SLURM cluster on this machine: eval "$(slurm/testbed/up)"')
    parser.add_argument("--nodes", type=int, default=4, choices=range(1, MAX_NODES + 1), metavar="N")
    parser.add_argument("--send-user-signal", action="store_true", help="preemption sends a job's --signal")
    options = parser.parse_args()
    testbed = Testbed(options.dir, num_nodes=options.nodes, send_user_signal=options.send_user_signal)
    if exit_code := _reported("up", testbed.up):
        return exit_code
    for name, value in testbed.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def down_command() -> int:
    """`slurm/testbed/down`: ends a testbed with all its jobs; its files and logs stay."""
    options = _parser("End a testbed with all its jobs; its logs stay.").parse_args()
    return _reported("down", Testbed(options.dir).down)
