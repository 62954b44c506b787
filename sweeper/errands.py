"""A child process that a launch sends for something, and waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sweeper.companion import environment
from sweeper.errors import EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_OK, SweeperError


def send(module: str, *arguments: str, told: str = "null", variables: Mapping[str, str] | None = None) -> Any:
    """Run `python -m MODULE ARGUMENT…` (see `answer`) to its end and return its answer.

    For clients that start threads: a launcher that forks must have none.

    Args:
        module: Ends with `answer(…)`.
        arguments: Of its command line.
        told: What it reads from stdin.
        variables: More of its environment.

    Raises:
        SystemExit: It failed and has said why; with its exit code.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments], input=told, encoding="utf-8",
        stdout=subprocess.PIPE, env={**environment(), **(variables or {})}, check=False,
    )  # fmt: skip
    if child.returncode != EXIT_OK:
        raise SystemExit(child.returncode if child.returncode > 0 else EXIT_NOT_WELL)
    return json.loads(child.stdout.splitlines()[-1])


def answer(act: Callable[[], Any]) -> NoReturn:
    """Be the child of `send`: what `act` returns is the last line on stdout, what it raises one on stderr."""
    code = EXIT_OK
    try:
        print(json.dumps(act()), flush=True)
    except SweeperError as error:
        print(f"sweeper: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last border: people get a paragraph
        print(f"sweeper: unexpected {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        code = EXIT_NOT_WELL
    sys.stderr.flush()
    os._exit(code)  # a client's threads may hang
