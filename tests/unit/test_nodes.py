"""The process that serves another node of a training, with programs in place of torchrun's agents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeper.errors import ConfigError
from sweeper.trainer import nodes, run
from sweeper.trainer.nodes import Order

AGENT = (
    "import os, sys, time; open(sys.argv[1], 'a').write(f'{sys.argv[2]} {os.getpid()}\\n'); time.sleep(60)"
)
SERVE = f"""
import subprocess, sys
from pathlib import Path
from sweeper.trainer import nodes

def start(order):
    argv = [sys.executable, "-c", {AGENT!r}, order.log, order.run_id]
    return subprocess.Popen(argv, start_new_session=True)

nodes._start = start
sys.exit(nodes.serve(Path(sys.argv[1])))
"""


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answer


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv(nodes.DIRECTORY_VARIABLE, str(tmp_path / "nodes"))
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path / "nodes")])
    yield process
    process.kill()
    process.wait()


def started(log: Path) -> list[tuple[str, int]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}") or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_it_runs_the_newest_order_alone_until_the_directory_is_gone(
    service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    nodes.order(Order("n1:1", "first", 2, 1, f"{tmp_path}:1", str(log)))
    ((_, first),) = until(lambda: started(log))
    os.kill(service.pid, signal.SIGTERM)  # SLURM warns of a preemption
    nodes.order(Order("n1:2", "second", 2, 1, f"{tmp_path}:2", str(log)))
    _, (name, second) = until(lambda: found if len(found := started(log)) == 2 else None)
    assert name == "second"
    until(lambda: is_gone(first))
    nodes.withdraw()
    until(lambda: is_gone(second))
    assert service.poll() is None
    (tmp_path / "nodes").rmdir()
    assert service.wait(timeout=20) == 0


def test_ranks_of_other_nodes_hold_no_database_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPER_STORAGE", "postgresql://me:secret@host/db")
    monkeypatch.setenv("PGPASSWORD", "secret")
    given: dict[str, Any] = {}
    monkeypatch.setattr(nodes.subprocess, "Popen", lambda *_, **more: given.update(more))
    nodes._start(Order("n1:1", "first", 2, 1, f"{tmp_path}:1", str(tmp_path / "log")))
    assert given["env"]["SWEEPER_ATTEMPT"] == f"{tmp_path}:1"
    assert "secret" not in str(given["env"])


def test_a_job_whose_script_serves_no_other_node_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\$SWEEPER_NODES_DIR is not set.*launcher=slurm"):
        nodes.check({})
    nodes.check({nodes.DIRECTORY_VARIABLE: "/somewhere"})


def test_gpus_are_told_only_of_a_training_that_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: False, get_device_name=lambda: "NVIDIA H100", device_count=lambda: 4
    )
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert run._devices() == {}
    cuda.is_initialized = lambda: True
    assert run._devices() == {"gpu": "NVIDIA H100", "gpu_count": 4, "cuda_version": "12.8"}
    monkeypatch.delitem(sys.modules, "torch")
    assert run._devices() == {}
