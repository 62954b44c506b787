"""The mirror process and the worker's handle on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arriving import add_checkpoint, make_run

from sweeper import processes, rundir
from sweeper.mirror import MirrorSettings, generations, indexes, joining
from sweeper.mirror import mirror as handle
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.mirror import Mirror

RUN = "simple.r.00000"


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen that {what}"
        time.sleep(0.01)


class Copied:
    """A data directory that holds a generation, its handle, and what the handle said."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.data_dir, self.url = tmp_path / "data", f"file://{tmp_path}/store"
        self.store = tmp_path / "store" / "simple"
        joining.join(self.url, "simple", data_dir=self.data_dir, say=lambda text: None)
        self.bucket = Bucket.open(self.url, "simple")
        given = {"every_s": 0.0, "finish_timeout": 20.0, **settings}
        self.mirror = Mirror(
            MirrorSettings.from_config({"url": self.url, **given}), data_dir=self.data_dir, sweep="simple"
        )
        self.said: list[str] = []

    def begin(self, run_dir: Path, **changes: Any) -> None:
        self.mirror.begin(run_dir=run_dir, **{"lease_epoch": 1, "attempt": 1, "keep_last": 3, **changes})

    def until(self, condition: Callable[[], Any], what: str) -> None:
        def look() -> Any:
            self.said += self.mirror.poll()
            return condition()

        until(look, what)

    def step(self, run_id: str = RUN) -> int | None:
        index, _ = indexes.read_newest(self.bucket, run_id)
        return index.step if index else None

    def close(self) -> list[str]:
        warnings: list[str] = []
        self.mirror.close(warnings.append)
        self.said += warnings
        return warnings


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Copied]:
    made = Copied(tmp_path)
    yield made
    made.mirror._companion.drop()


def test_each_commit_is_copied_and_the_end(copied: Copied) -> None:
    run_dir = make_run(copied.data_dir, steps=())
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: indexes.read_newest(copied.bucket, RUN)[0], "the run was copied at its beginning")
    for step in (10, 20):
        add_checkpoint(run_dir, step)
        copied.until(lambda step=step: copied.step() == step, "a commit was copied")
    rundir.write_result(run_dir, lease_epoch=1, state="completed", value=0.5, reason="")
    copied.mirror.end(run_dir=run_dir, lease_epoch=1, attempt=1)
    assert copied.close() == []
    assert indexes.final_runs(copied.bucket) == {RUN}
    assert copied.mirror.pid is None


def test_what_ended_while_nobody_copied_is_copied_by_the_next(copied: Copied) -> None:
    for number in range(3):
        make_run(copied.data_dir, number=number, result={})
    make_run(copied.data_dir, number=3)  # it goes on one day, and is copied then
    copied.mirror.start()
    assert copied.close() == []
    assert indexes.final_runs(copied.bucket) == {f"simple.r.0000{number}" for number in range(3)}


def test_a_killed_process_is_started_again(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "RESTART_S", 0.0)
    run_dir = make_run(copied.data_dir, steps=(10,))
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: copied.step() == 10, "it was copied")
    first = copied.mirror.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    add_checkpoint(run_dir, 20)
    copied.until(lambda: copied.step() == 20, "another process copied the next commit")
    assert copied.mirror.pid not in (None, first)
    assert [text for text in copied.said if "signal 9" in text and "started again" in text]


def test_signals_of_the_group_do_not_end_it(copied: Copied) -> None:
    run_dir = make_run(copied.data_dir, steps=(10,))
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: copied.step() == 10, "it was copied")
    pid = copied.mirror.pid
    assert pid is not None
    assert os.getsid(pid) == pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == 10
    for number in processes.NOT_FOR_CHILDREN:
        os.kill(pid, number)
    add_checkpoint(run_dir, 20)
    copied.until(lambda: copied.step() == 20, "the same process copied on")
    assert copied.mirror.pid == pid


def test_a_machine_that_was_replaced_hears_of_it(copied: Copied) -> None:
    run_dir = make_run(copied.data_dir, steps=(10,))
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: copied.step() == 10, "it was copied")
    newer = generations.claim(copied.bucket, 2)
    before = copied.bucket.names("")
    add_checkpoint(run_dir, 20)
    copied.until(lambda: copied.mirror.fenced, "it heard of it")
    assert f"{newer.host} has taken over" in copied.mirror.fenced
    assert copied.bucket.names("") == before
    copied.begin(run_dir)
    assert copied.close() == []
    assert copied.said == []


def test_a_run_of_a_newer_owner_is_left_to_it(copied: Copied) -> None:
    run_dir, other = make_run(copied.data_dir, steps=(10,)), make_run(copied.data_dir, number=1, steps=())
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: copied.step() == 10, "it was copied")
    rundir.marker_path(run_dir).write_bytes(rundir.to_json({"lease_epoch": 2}))
    add_checkpoint(run_dir, 20)
    copied.mirror.end(run_dir=run_dir, lease_epoch=1, attempt=1)
    copied.begin(other)
    copied.until(lambda: indexes.read_newest(copied.bucket, other.name)[0], "the next run was copied")
    assert copied.step() == 10
    assert copied.close() == []


def test_a_store_that_refuses_is_said_once_and_tried_again(copied: Copied, tmp_path: Path) -> None:
    run_dir = make_run(copied.data_dir, steps=(10,))
    aside = tmp_path / "aside"
    copied.store.rename(aside)
    copied.store.write_text("no directory any more")
    copied.mirror.start()
    copied.begin(run_dir)
    copied.until(lambda: copied.said, "it was said")
    assert "cannot be written" in copied.said[0]
    copied.store.unlink()
    aside.rename(copied.store)
    copied.until(lambda: copied.step() == 10, "it was copied after all")
    copied.until(lambda: "can be written again" in copied.said[-1], "that was said, too")
    assert len(copied.said) == 2


def test_what_could_not_be_copied_is_named_at_the_end(tmp_path: Path) -> None:
    copied = Copied(tmp_path, finish_timeout=1.5)
    run_dir = make_run(copied.data_dir, steps=(10,), result={})
    shutil.rmtree(copied.store)
    copied.store.write_text("no directory any more")
    copied.mirror.start()
    copied.begin(run_dir)
    copied.mirror.end(run_dir=run_dir, lease_epoch=1, attempt=1)
    before = time.monotonic()
    assert f"NOT everything was copied within 1.5 s (mirror.finish_timeout): {RUN}" in copied.close()[-1]
    assert time.monotonic() - before < 5
    assert copied.mirror.pid is None


def test_without_a_url_there_is_no_process(tmp_path: Path) -> None:
    mirror = Mirror(MirrorSettings(), data_dir=tmp_path, sweep="simple")
    mirror.start()
    mirror.begin(run_dir=tmp_path, lease_epoch=1, attempt=1, keep_last=3)
    mirror.end(run_dir=tmp_path, lease_epoch=1, attempt=1)
    said: list[str] = []
    mirror.close(said.append)
    assert mirror.poll() == said == []
    assert mirror.pid is None


def test_it_dies_with_its_worker(copied: Copied) -> None:
    code = (
        "import sys; from pathlib import Path; from sweeper.mirror import MirrorSettings\n"
        "from sweeper.mirror.mirror import Mirror\n"
        f"m = Mirror(MirrorSettings({copied.url!r}), data_dir=Path({str(copied.data_dir)!r}), sweep='simple')\n"
        "m.start(); print(m.pid, flush=True); sys.stdin.read()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    assert processes.start_ticks(pid) is not None
    worker.kill()
    worker.wait()
    until(lambda: processes.start_ticks(pid) is None, "it ended with its worker")
