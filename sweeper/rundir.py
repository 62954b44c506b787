"""The run directory: identity, marker, overrides, config, result. Bytes, JSON and YAML only.

Everything here is read as data that somebody may have damaged: bounded in size, never through
a symbolic link, never executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sweeper import fsops
from sweeper.errors import ConfigError, Fenced, SweeperError
from sweeper.records import Params, ParamValue, ProcessId

SCHEMA_VERSION = 1
MAX_TEXT_BYTES = 4 << 20
SWEEP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
RUN_ID = re.compile(r"([a-z0-9][a-z0-9_-]{0,63})\.r\.([0-9]{5,9})\Z")

WANDB_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
OVERRIDES_FILE = "train_config_overrides.yaml"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "logs"


class Damaged(SweeperError):
    """A file of a run directory is not what was written: too large, not regular, not parseable."""


def check_sweep_name(name: str) -> str:
    """Return `name`, or raise ConfigError when it cannot name a directory safely."""
    if not isinstance(name, str) or not SWEEP_NAME.match(name):
        raise ConfigError(
            f"sweep.name={name!r} is not a valid name",
            do="Use lower-case letters, digits, - and _, at most 64, starting with a letter or digit.",
        )
    return name


def run_id(sweep: str, number: int) -> str:
    """The stable id of a run: `<sweep>.r.00012`."""
    return f"{sweep}.r.{number:05d}"


def new_wandb_id(run_id: str) -> str:
    """The W&B id of a run: its own id and 8 random characters, so that a reused name never collides."""
    return f"{run_id}.{secrets.token_hex(4)}"


def relative_path(sweep: str, number: int) -> str:
    """Where a run's directory is, relative to the data directory."""
    return f"sweep/{sweep}/runs/{run_id(sweep, number)}"


def attempt_log(run_dir: Path, attempt: int) -> Path:
    """The file that holds everything attempt number `attempt` printed."""
    return run_dir / LOGS_DIR / f"attempt_{attempt:04d}.log"


def marker_path(run_dir: Path) -> Path:
    """The marker: there as long as the run has no final result in disk *and* database."""
    return run_dir / f"{run_dir.name}.incomplete"


# --- reading -------------------------------------------------------------------------------


def read_bytes(path: Path, *, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file, refusing links, devices and anything larger than `limit_bytes`.

    Raises:
        FileNotFoundError: It is not there.
        Damaged: It is not a regular file, or too large.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"{path} cannot be read", why=error.strerror or str(error)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is not a regular file")
        if status.st_size > limit_bytes:
            raise Damaged(f"{path} has {status.st_size} bytes, more than {limit_bytes} allowed")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise Damaged(f"{path} cannot be read", why=error.strerror or str(error)) from error
    finally:
        os.close(fd)


def read_json(path: Path, *, limit_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or Damaged."""
    data = read_bytes(path, limit_bytes=limit_bytes)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not valid JSON", why=str(error)) from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} does not hold a JSON object")
    return value


def to_json(value: dict[str, Any]) -> bytes:
    """JSON for people and programs: sorted keys, one trailing newline."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


# --- identity ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """run.json: what a run is, written once and never changed."""

    run_id: str
    sweep: str
    number: int
    trial: int
    params: Params
    seed: int
    threads: int
    wandb_run_id: str
    config_digest: str
    code_version: str
    created_at: str
    replaces: str | None = None
    retry_of: str | None = None
    schema_version: int = SCHEMA_VERSION


def read_identity(run_dir: Path) -> Identity:
    """Read and check run.json.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is not one of ours, or names another run than its directory.
    """
    path = run_dir / RUN_FILE
    data = read_json(path)
    try:
        identity = Identity(**data)
    except TypeError as error:
        raise Damaged(f"{path} does not describe a run", why=str(error)) from error
    match = RUN_ID.match(str(identity.run_id))
    if not match or identity.run_id != run_dir.name:
        raise Damaged(f"{path} names run {identity.run_id!r}, but lies in {run_dir.name!r}")
    if match[1] != identity.sweep or int(match[2]) != identity.number:
        raise Damaged(f"{path} contradicts itself about sweep and number")
    if identity.schema_version != SCHEMA_VERSION:
        raise Damaged(f"{path} has schema {identity.schema_version}, not {SCHEMA_VERSION}")
    if not _are_params(identity.params):
        raise Damaged(f"{path} has parameters that are not plain values")
    if not _is_well_typed(identity):
        raise Damaged(f"{path} has fields that are not what was written")
    return identity


def _is_well_typed(identity: Identity) -> bool:
    numbers = (identity.number, identity.trial, identity.seed, identity.threads)
    texts = (identity.config_digest, identity.code_version, identity.created_at)
    others = (identity.replaces, identity.retry_of)
    return (
        all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and all(other is None or (isinstance(other, str) and RUN_ID.match(other)) for other in others)
        and isinstance(identity.wandb_run_id, str)
        and bool(WANDB_RUN_ID.match(identity.wandb_run_id))
    )


def read_config(run_dir: Path, config_digest: str) -> dict[str, Any]:
    """The run's composed configuration as plain values.

    Raises:
        FileNotFoundError: There is none.
        Damaged: It is not the one with this digest, or not what we write.
    """
    import yaml
    from blake3 import blake3

    path = run_dir / CONFIG_FILE
    data = read_bytes(path)
    if blake3(data).hexdigest() != config_digest:
        raise Damaged(f"{path} is not the one this run began with")
    try:
        if b"&" in data and any(
            isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)
        ):
            raise Damaged(f"{path} has YAML aliases, which are never written")
        config = yaml.safe_load(data)  # HAZARD: the loader in C dies of deep nesting
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not valid YAML", why=str(error).splitlines()[0]) from error
    if not isinstance(config, dict):
        raise Damaged(f"{path} is not a run's configuration")
    return config


def _are_params(params: object) -> bool:
    return isinstance(params, dict) and all(
        isinstance(key, str) and isinstance(value, str | int | float) for key, value in params.items()
    )


def create(run_dir: Path, identity: Identity, *, config: bytes, overrides: bytes) -> None:
    """Create the run directory with its immutable files, durably; a whole one is kept as it is.

    Safe to repeat after a crash at any point. The parent directories are created as needed.
    """
    make_parents(run_dir)
    fsops.make_dir(run_dir, exist_ok=True)
    for name in (CHECKPOINTS_DIR, LOGS_DIR):
        fsops.make_dir(run_dir / name, exist_ok=True)
    if not (run_dir / RUN_FILE).exists():
        fsops.put(run_dir / CONFIG_FILE, config)
        fsops.put(run_dir / OVERRIDES_FILE, overrides)
        fsops.fsync_dir(run_dir)
        # Last: a directory with run.json is whole. Without it, what a crash left of the other two
        # may be of another launch's configuration, whose digest is not the one in this identity.
        fsops.replace(run_dir / RUN_FILE, to_json(asdict(identity)))
    fsops.fsync_dir(run_dir.parent)


def make_parents(run_dir: Path) -> None:
    """Create the directories above a run, durably, 0700 below the data directory."""
    missing = []
    parent = run_dir.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        fsops.make_dir(directory, exist_ok=True)
        fsops.fsync_dir(directory.parent)


# --- overrides -----------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")  # only there does a backslash mean more than itself to Hydra
_KEYWORDS = {"true", "false", "null", "nan", "inf"}


def override(key: str, value: ParamValue) -> str:
    """One Hydra override, e.g. `trainer.lr=0.001`; text is quoted where Hydra's grammar wants it."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, int | float):
        return f"{key}={value!r}"
    if _PLAIN.match(value) and value.lower() not in _KEYWORDS:
        return f"{key}={value}"
    quoted = _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"{key}='{quoted}'"


def overrides_yaml(params: Params) -> bytes:
    """The overrides file: a YAML list of Hydra overrides, in the parameters' order."""
    lines = (f"- {json.dumps(override(key, value))}\n" for key, value in sorted(params.items()))
    return ("".join(lines) or "[]\n").encode()


def read_overrides(run_dir: Path) -> list[str]:
    """The overrides of a run as a list of texts; data, never executed. Raises Damaged.

    The file is a YAML list of JSON texts, one a line; anything else (anchors, tags, nesting)
    is not something we wrote and is refused unread.
    """
    path = run_dir / OVERRIDES_FILE
    text = read_bytes(path).decode(errors="replace")
    if text == "[]\n":
        return []
    result = []
    for line in text.splitlines():
        try:
            item = json.loads(line.removeprefix("- ")) if line.startswith("- ") else None
        except ValueError:
            item = None
        if not isinstance(item, str):
            raise Damaged(f"{path} is not a list of overrides", why=f"it has the line {line[:80]!r}")
        result.append(item)
    return result


# --- marker and result ---------------------------------------------------------------------


def write_marker(run_dir: Path, *, attempt: int, lease_epoch: int, owner: ProcessId, started_at: str) -> None:
    """Say on disk who trains this run now; replaces an older owner's marker atomically."""
    fsops.replace(
        marker_path(run_dir),
        to_json(
            {
                "run_id": run_dir.name,
                "attempt": attempt,
                "lease_epoch": lease_epoch,
                "host": owner.host,
                "machine_id": owner.machine_id,
                "boot_id": owner.boot_id,
                "pid_namespace": owner.pid_namespace,
                "uid": owner.uid,
                "pid": owner.pid,
                "pid_start": owner.start_ticks,
                "slurm_job_id": owner.slurm_job_id,
                "started_at": started_at,
            }
        ),
    )


def read_owner(run_dir: Path) -> ProcessId | None:
    """The process that the marker names, alive or not; None when it names none, or nothing we wrote."""
    try:
        marker = read_json(marker_path(run_dir))
        owner = ProcessId(
            host=marker["host"], machine_id=marker["machine_id"], boot_id=marker["boot_id"], pid_namespace=marker["pid_namespace"],
            uid=marker["uid"], pid=marker["pid"], start_ticks=marker["pid_start"], slurm_job_id=marker["slurm_job_id"],
        )  # fmt: skip
    except (FileNotFoundError, Damaged, KeyError):
        return None
    return owner if type(owner.pid) is int and 0 < owner.pid < 2**31 else None


def remove_marker(run_dir: Path) -> None:
    """Remove the marker. INVARIANT: only after the final result is on disk and in the database."""
    fsops.unlink(marker_path(run_dir), missing_ok=True)
    fsops.fsync_dir(run_dir)


def write_result(
    run_dir: Path, *, lease_epoch: int, state: str, value: float | None, reason: str, **more: Any
) -> None:
    """Write result.json once; what an older epoch left at its place is moved aside.

    Raises:
        Fenced: A newer owner's result is there, and stays.
    """
    path = run_dir / RESULT_FILE
    data = result_json(run_dir.name, lease_epoch=lease_epoch, state=state, value=value, reason=reason, **more)
    try:
        fsops.create(path, data)
    except FileExistsError:
        move_result_aside(run_dir, lease_epoch=lease_epoch)
        fsops.create(path, data)


def result_json(
    run_id: str, *, lease_epoch: int, state: str, value: float | None, reason: str, **more: Any
) -> bytes:
    """What result.json holds."""
    known = {"run_id": run_id, "lease_epoch": lease_epoch, "state": state, "value": value, "reason": reason}
    return to_json({**known, **more})


def move_result_aside(run_dir: Path, *, lease_epoch: int) -> Path:
    """Rename a result that does not count; it is kept for people to read.

    It is looked at only when it has been moved: between a look and a move another owner could
    have put a newer one there.

    Raises:
        Fenced: It is of a newer epoch than `lease_epoch`; it was put back.
    """
    path = run_dir / RESULT_FILE
    aside = path.with_name(f"result.aside.{os.urandom(4).hex()}.json")
    fsops.rename(path, aside)
    if _epoch_of(aside) > lease_epoch:
        with contextlib.suppress(FileExistsError):
            fsops.link(aside, path)
        fsops.unlink(aside, missing_ok=True)
        fsops.fsync_dir(run_dir)
        raise Fenced(
            f"run {run_dir.name} has the result of a newer owner",
            why=f"this attempt has lease epoch {lease_epoch}",
        )
    fsops.fsync_dir(run_dir)
    return aside


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json, or None when there is none. Raises Damaged."""
    try:
        return read_json(run_dir / RESULT_FILE)
    except FileNotFoundError:
        return None


# --- finding -------------------------------------------------------------------------------


def largest_epoch(run_dir: Path) -> int:
    """The largest lease_epoch that anything in this run directory was written under; 0 if none."""
    epochs = [0]
    for path in (marker_path(run_dir), run_dir / RESULT_FILE):
        try:
            epochs.append(_epoch(read_json(path)))
        except (FileNotFoundError, Damaged):
            continue
    root = run_dir / CHECKPOINTS_DIR
    for manifest in sorted(root.glob("step_*/MANIFEST.json")) + sorted(
        root.glob(".condemned/*/MANIFEST.json")
    ):
        try:
            epochs.append(_epoch(read_json(manifest)))
        except (FileNotFoundError, Damaged):
            continue
    for entry in root.glob(".tmp-*"):
        number = entry.name.split("-")[1]
        epochs.append(int(number) if number.isdigit() and len(number) < 12 else 0)
    return max(epochs)


def _epoch_of(path: Path) -> int:
    try:
        return _epoch(read_json(path))
    except (FileNotFoundError, Damaged):
        return 0


def _epoch(data: dict[str, Any]) -> int:
    value = data.get("lease_epoch")
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def run_dirs(data_dir: Path, sweep: str | None = None) -> Iterator[Path]:
    """All run directories below a data directory, by name. Links are not followed."""
    root = data_dir / "sweep"
    names = [sweep] if sweep else sorted(p.name for p in _entries(root) if SWEEP_NAME.match(p.name))
    for name in names:
        for entry in sorted(_entries(root / name / "runs"), key=lambda e: e.name):
            if RUN_ID.match(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


UPLOADS = ".wandb_upload."
"""What the names of the tracker's directories begin with, out of which it uploads to W&B."""


def clean(run_dir: Path, *, is_tracked: bool = False) -> None:
    """Remove what crashes left behind: temporary files. Only the owner of the run may do this.

    Args:
        is_tracked: Our own tracker still uploads; what it uploads stays.
    """
    for entry in _entries(run_dir):
        if fsops.is_temporary(entry.name) and not (is_tracked and entry.name.startswith(UPLOADS)):
            fsops.remove_tree(Path(entry.path))
