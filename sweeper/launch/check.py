"""What is checked after composing and before Hydra creates anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from sweeper.errors import ConfigError, SweeperError
from sweeper.rundir import check_sweep_name


class CheckBeforeRun(Callback):
    """A Hydra callback: refuses bad names and places before Hydra makes its run directory.

    Hydra swallows exceptions of callbacks, therefore it says what is wrong and exits.
    """

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """Called by Hydra between composing and creating the run directory."""
        try:
            check_places(config)
        except SweeperError as error:
            print(f"sweeper: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


def check_places(config: Any) -> None:
    """Raise ConfigError unless the sweep has a safe name and the data directory can be written."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config.sweep, "name"):
        raise ConfigError(
            "no sweep was chosen",
            do="Add +sweep=simple, a sweep of your own with --config-dir, or sweep.name=….",
        )
    check_sweep_name(config.sweep.name)
    data_dir = Path(str(config.data_dir))
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(data_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        probe = data_dir / f".sweeper.{os.getpid()}.tmp"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"the data directory {data_dir} cannot be written",
            why=error.strerror or str(error),
            do="Name another with data_dir=, make it writable, or free some space.",
        ) from error
