"""Run directories made by hand, and a source of them that does what a test tells it to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sweeper import checkpoints, manifests, rundir
from sweeper.arrivals import Gone, Listed, Listing
from sweeper.rundir import Identity

CONFIG = b"seed: 1\n"


def make_run(
    data_dir: Path,
    *,
    number: int = 0,
    sweep: str = "simple",
    steps: Sequence[int] = (10, 20, 30),
    lease_epoch: int = 1,
    result: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run directory as a worker leaves it, without a marker."""
    run_id = rundir.run_id(sweep, number)
    identity = Identity(
        run_id=run_id, sweep=sweep, number=number, trial=number, params={"trainer.lr": 0.01}, seed=1, threads=1,
        wandb_run_id=f"{run_id}.abcdef01", config_digest=manifests.digest(CONFIG), code_version="1", created_at="now",
    )  # fmt: skip
    run_dir = data_dir / rundir.relative_path(sweep, number)
    identity = replace(identity, **changes)
    rundir.create(run_dir, identity, config=CONFIG, overrides=rundir.overrides_yaml(identity.params))
    (run_dir / rundir.METRICS_FILE).write_bytes(b'{"step":1,"loss":0.5}\n' * (max(steps, default=0) + 5))
    rundir.attempt_log(run_dir, 1).write_text("hello\n")
    for step in steps:
        add_checkpoint(run_dir, step, lease_epoch=lease_epoch)
    if result is not None:
        rundir.write_result(
            run_dir,
            **{"lease_epoch": lease_epoch, "state": "completed", "value": 0.5, "reason": "", **result},
        )
    return run_dir


def add_checkpoint(
    run_dir: Path, step: int, *, lease_epoch: int = 1, start: int = 0, config: bytes = CONFIG
) -> manifests.Manifest:
    """Commit one more checkpoint."""
    root = run_dir / rundir.CHECKPOINTS_DIR
    draft = checkpoints.Draft(
        root, run_id=run_dir.name, step=step, lease_epoch=lease_epoch, lineage=((lease_epoch, start),),
        parent_step=None, config_digest=manifests.digest(config),
    )  # fmt: skip
    draft.add_bytes("model.pth", f"weights of step {step}".encode() * 100)
    draft.add_bytes("state.json", json.dumps({"metrics_offset": 22 * step}).encode())
    return checkpoints.commit(
        draft, check_lease=lambda: None, record=lambda manifest: None, committed_at=f"at {step}"
    )


@dataclass
class Folder:
    """A data directory as a source. `strange` files are listed but not there; `on_fetch` may spoil one."""

    data_dir: Path
    strange: dict[str, Listed] = field(default_factory=dict)
    on_fetch: Callable[[str, Path], None] = lambda name, target: None
    lease_epoch: int = 0
    fetched: list[str] = field(default_factory=list)
    num_listings: int = 0
    with_digests: bool = False

    name = "the folder"

    def run_ids(self, sweep: str) -> list[str]:
        return [path.name for path in rundir.run_dirs(self.data_dir, sweep)]

    def _run_dir(self, run_id: str) -> Path:
        return self.data_dir / "sweep" / run_id.split(".r.")[0] / "runs" / run_id

    def listing(self, run_id: str) -> Listing:
        self.num_listings += 1
        run_dir = self._run_dir(run_id)
        files = {
            str(path.relative_to(run_dir)): Listed(
                path.stat().st_size,
                manifests.digest(path.read_bytes()) if self.with_digests else None,
            )
            for path in run_dir.rglob("*")
            if path.is_file() and not path.is_symlink() and path.suffix != ".incomplete"
        }
        return Listing({**files, **self.strange}, lease_epoch=self.lease_epoch, attempt=1)

    def fetch(self, run_id: str, name: str, target: Path, *, limit_bytes: int) -> None:
        self.fetched.append(name)
        try:
            shutil.copyfile(self._run_dir(run_id) / name, target)
        except FileNotFoundError:
            raise Gone(f"{name} is gone") from None
        self.on_fetch(name, target)


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below a directory, to see that nothing was changed."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
