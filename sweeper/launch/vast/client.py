"""The `vastai` program, called without a shell. What it does not say clearly is unknown, never gone.

It pins many packages exactly, so it has an environment of its own and is never imported. Its exit
code says little: errors of the server end with 0 and a JSON object on stderr, `destroy` prints
nothing at all, and a connection that fails is a traceback. Source: vastai 1.9.1, cli/main.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper.errors import ConfigError, SweeperError

CALL_S = 150.0
"""How long one command may take. The program itself gives up on a request after 120 s."""

PROGRAM = "SWEEPER_VASTAI"
"""Names the program, where it is not `vastai` on the PATH."""

# HAZARD: anybody on the machine can read the arguments of a process. The program takes the values of
# `--env` only there; so its own Python is given the arguments on stdin, and runs it within itself.
_HIDDEN = (
    "import json, runpy, sys; sys.path[:] = [p for p in sys.path if p]; "
    "sys.argv = json.load(sys.stdin); runpy.run_path(sys.argv[0], run_name='__main__')"
)

_TRANSIENT = (408, 429)


class VastError(SweeperError):
    """`vastai` failed, or its answer cannot be understood.

    Attributes:
        status: The server's HTTP status, if there was one.
    """

    def __init__(self, what: str, *, why: str = "", do: str = "", status: int | None = None) -> None:
        super().__init__(what, why=why, do=do)
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """The server understood and said no. Everything else may have happened, or not."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in _TRANSIENT


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be rented.

    Attributes:
        usd_h: On demand, dollars per hour with the disk that was asked for.
        min_bid_usd_h: Below it nobody gets it as an interruptible one.
        storage_usd_h: The part that is due while the instance is stopped, too.
    """

    offer_id: int
    machine_id: int
    gpu_name: str
    num_gpus: int
    usd_h: float
    min_bid_usd_h: float
    storage_usd_h: float
    reliability: float
    where: str


@dataclass(frozen=True, slots=True)
class Instance:
    """What is rented.

    Attributes:
        actual: State of the container; "" while it is being provided.
        intended: State that was asked for, by us or somebody else.
    """

    instance_id: int
    label: str
    actual: str
    intended: str
    state: str
    usd_h: float
    machine_id: int
    gpu: str
    started_at_s: float

    @property
    def is_running(self) -> bool:
        return self.actual == "running" and self.state != "stopped"


class Client:
    """Calls the program.

    Args:
        program: Its path; None: $SWEEPER_VASTAI, else `vastai` on the PATH.
        secrets: What must be in no message, whatever the program says.
    """

    def __init__(
        self, program: str | None = None, *, secrets: Iterable[str] = (), timeout_s: float = CALL_S
    ) -> None:
        found = program or os.environ.get(PROGRAM) or shutil.which("vastai")
        if not found or not os.access(found, os.X_OK):
            raise ConfigError(
                "launcher=vast needs the program `vastai`",
                why=f"{found} cannot be executed" if found else "it is not on the PATH",
                do=f"Install it in an environment of its own, e.g. `pipx install vastai`, or name it with {PROGRAM}.",
            )
        self._program = found
        self._secrets = [secret for secret in secrets if secret]
        self._timeout_s = timeout_s

    def search(self, query: str, *, is_bid: bool, disk_gb: float, limit: int = 64) -> list[Offer]:
        """Offers that fit, the cheapest first. Raises VastError."""
        rows = self._json(
            "search", "offers", query, "--type", "bid" if is_bid else "on-demand",
            "--order", "min_bid" if is_bid else "dph_total", "--limit", str(limit), "--storage", f"{disk_gb:g}",
        )  # fmt: skip
        if not isinstance(rows, list):
            raise VastError("vastai search offers: the answer is no list of offers")
        offers = [offer for row in rows if (offer := _offer(row)) is not None]
        return sorted(offers, key=lambda offer: offer.min_bid_usd_h if is_bid else offer.usd_h)

    def instances(self) -> list[Instance]:
        """Everything that is rented in this account. Raises VastError, which says nothing about any instance."""
        rows = self._json("show", "instances")
        if not isinstance(rows, list):
            raise VastError("vastai show instances: the answer is no list of instances")
        return [_instance(row) for row in rows]

    def create(
        self, offer_id: int, *, image: str, disk_gb: float, label: str, onstart: Path,
        environment: Mapping[str, str], bid_usd_h: float | None,
    ) -> int:  # fmt: skip
        """Rent; returns the instance's id.

        Raises:
            VastError: Refused; or unknown, and then there may be an instance of this label.
        """
        bid = [] if bid_usd_h is None else ["--bid_price", f"{bid_usd_h:.4f}"]
        arguments = [
            "create", "instance", str(offer_id), "--image", image, "--disk", f"{disk_gb:g}", "--label", label,
            "--onstart", str(onstart), "--env", env_option(environment), "--ssh", "--cancel-unavail", *bid,
        ]  # fmt: skip
        answer = self._json(*arguments, is_hidden=True)
        number = answer.get("new_contract") if isinstance(answer, dict) else None
        if isinstance(answer, dict) and answer.get("success") and isinstance(number, int):
            return number
        said = answer.get("msg") or answer.get("error") if isinstance(answer, dict) else None
        # Only `success: false` is a no.
        status = 400 if isinstance(answer, dict) and answer.get("success") is False else None
        raise VastError(
            f"vastai create instance {offer_id}: nothing was created",
            why=self._hide(str(said)),
            status=status,
        )

    def start(self, instance_id: int) -> None:
        """Ask for a stopped instance to run again. Raises VastError."""
        self._run("start", "instance", str(instance_id))

    def stop(self, instance_id: int) -> None:
        """Ask for an instance to stop; its disk stays, and is paid for. Raises VastError."""
        self._run("stop", "instance", str(instance_id))

    def destroy(self, instance_id: int) -> None:
        """Ask for an instance to go. Only `instances` shows whether it is gone. Raises VastError."""
        self._run("destroy", "instance", str(instance_id), "--yes")

    def logs(self, instance_id: int, *, num_lines: int) -> str:
        """The last lines that the instance printed. Raises VastError."""
        return self._run("logs", str(instance_id), "--tail", str(num_lines))

    # --- how it is called ------------------------------------------------------------------

    def _json(self, *arguments: str, is_hidden: bool = False) -> Any:
        text = self._run(*arguments, is_hidden=is_hidden)
        try:
            return json.loads(text)
        except ValueError as error:
            shown = " ".join(self._hide(text).split())[:200] if not is_hidden else "no JSON"
            raise VastError(f"vastai {_verb(arguments)}: the answer is no JSON", why=shown) from error

    def _run(self, *arguments: str, is_hidden: bool = False) -> str:
        command, given = [self._program, *arguments, "--raw"], ""
        if is_hidden:
            given = json.dumps(command)
            command = [interpreter(Path(self._program)), "-c", _HIDDEN]
        what = f"vastai {_verb(arguments)}"
        try:
            # In a session of its own: Ctrl-C is for us, and must not cut a request that rents or destroys.
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, errors="replace",
                timeout=self._timeout_s, start_new_session=True, env=_environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise VastError(f"{what}: no answer after {self._timeout_s:g} s") from error
        except OSError as error:
            raise VastError(f"{what}: cannot be started", why=error.strerror or str(error)) from error
        self._check(what, done.returncode, done.stderr or ("" if is_hidden else done.stdout))
        return done.stdout

    def _check(self, what: str, code: int, printed: str) -> None:
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        for line in reversed(lines[-20:]):
            said = _error_object(line)
            if said is not None:
                status = said.get("status_code") or None
                raise VastError(
                    f"{what}: the server says {status}" if status else f"{what}: it failed", why=self._hide(str(said.get("msg"))),
                    do="Check VAST_API_KEY." if status in (401, 403) else "",
                    status=status if isinstance(status, int) else None,
                )  # fmt: skip
        if code != 0 and (cause := _no_connection(lines)):
            raise VastError(
                f"{what}: VastAI does not answer", why=self._hide(cause),
                do="Check the network (and VAST_URL, if it is set), then try again; VastAI's console shows what runs, and costs, meanwhile.",
            )  # fmt: skip
        if code != 0:
            raise VastError(
                f"{what}: exit {code}", why=self._hide(lines[-1] if lines else "nothing was said")
            )

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text


def _verb(arguments: Sequence[str]) -> str:
    """The command without its options, for messages."""
    words = [word for word in arguments[:3] if not word.startswith("-")]
    return " ".join(words[:2] if words[:2] == ["search", "offers"] else words)


def _environment() -> dict[str, str]:
    """Ours, without what would make another Python look for our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONUTF8": "1", "VASTAI_NO_UPDATE_CHECK": "1"}


def _error_object(line: str) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) and said.get("error") else None


def _no_connection(lines: Sequence[str]) -> str:
    """Why there was no answer, from the last line of a traceback; empty when it tells of something else."""
    last = lines[-1] if lines else ""
    failed = re.match(r"requests\.exceptions\.(\w*Connection\w*|\w*Timeout|SSLError|ProxyError)\b", last)
    if not failed:
        return ""
    host = re.search(r"host='([^']+)'", last)
    # At its end is what the system said, if it did: `… [Errno 111] Connection refused"))`.
    cause = re.split(r"\[Errno -?\d+\] ", last)[-1].strip("'\")(] ") if "[Errno" in last else failed[1]
    return f"{host[1]}: {cause}" if host else cause


def interpreter(program: Path) -> str:
    """The Python that runs a script, from its first lines. Raises ConfigError when it is no Python script.

    Source: pip writes `#!/path/python`, or for paths that are too long or have spaces
    `#!/bin/sh` and then `'''exec' "/path/python" …`.
    """
    try:
        head = program.resolve().read_bytes()[:1024].decode(errors="replace")
    except OSError:
        head = ""
    found = re.match(
        r"#!\s*(/\S*python[0-9.]*)\s*$|#!/bin/sh\n'''exec' \"?(/[^\"\n]*?)\"? ", head, re.MULTILINE
    )
    path = found and (found[1] or found[2])
    if not path or not os.access(path, os.X_OK):
        raise ConfigError(
            f"{program} is not a script that names its Python",
            why="values of variables would have to be in its arguments, where everybody on this machine can read them",
            do=f"Install it with `pipx install vastai`, and name that one with {PROGRAM} if it is not the first on the PATH.",
        )
    return path


def env_option(environment: Mapping[str, str]) -> str:
    """Variables as the program's `--env` reads them. Raises ConfigError for what it would change on the way.

    Source: vastai 1.9.1, utils.parse_env: words are split at spaces outside of quotes, and quotes
    at the ends of a value are dropped.
    """
    words = []
    for name, value in environment.items():
        if "'" in value or '"' in value or "\0" in value:
            raise ConfigError(
                f"the variable {name} cannot be handed to an instance",
                why="its value has quotes, which vastai does not keep",
                do="Encode it, e.g. with base64, and decode it in launcher.setup.",
            )
        words.append(f'-e {name}="{value}"' if " " in value else f"-e {name}={value}")
    return " ".join(words)


# --- what it answers -------------------------------------------------------------------------


def _number(row: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _offer(row: Any) -> Offer | None:
    """An offer; None if what a decision needs is missing."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), int):
        return None
    usd_h, min_bid = _number(row, "dph_total"), _number(row, "min_bid")
    if usd_h is None:
        return None
    return Offer(
        offer_id=row["id"], machine_id=int(_number(row, "machine_id") or 0), gpu_name=str(row.get("gpu_name") or "?"),
        num_gpus=int(_number(row, "num_gpus") or 0), usd_h=usd_h,
        min_bid_usd_h=usd_h if min_bid is None else min_bid,
        storage_usd_h=_number(row, "storage_total_cost") or 0.0,
        reliability=_number(row, "reliability", "reliability2") or 0.0, where=str(row.get("geolocation") or "?"),
    )  # fmt: skip


def _instance(row: Any) -> Instance:
    """An instance. Raises VastError rather than overlook one."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), int):
        raise VastError("vastai show instances: an entry has no id")
    return Instance(
        instance_id=row["id"], label=str(row.get("label") or ""), actual=str(row.get("actual_status") or ""),
        intended=str(row.get("intended_status") or ""), state=str(row.get("cur_state") or ""),
        usd_h=_number(row, "dph_total") or 0.0, machine_id=int(_number(row, "machine_id") or 0),
        gpu=f"{int(_number(row, 'num_gpus') or 0)}x {row.get('gpu_name') or '?'}",
        started_at_s=_number(row, "start_date") or 0.0,
    )  # fmt: skip
