"""The copy in an object store: whose it is, what it consists of, and that nothing breaks it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arriving
import pytest
from arriving import add_checkpoint, make_run, tree
from fsspec.implementations.memory import MemoryFileSystem

from sweeper import arrivals, rundir
from sweeper.checkpoints import steps_on_disk
from sweeper.errors import ConfigError, Fenced, NotWell, Released
from sweeper.manifests import digest
from sweeper.mirror import generations, indexes, joining
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copier, Copy, Overtaken, Subject
from sweeper.mirror.generations import Generation, Step, Token
from sweeper.mirror.indexes import Entry, Index, Writer
from sweeper.mirror.joining import Terms
from sweeper.mirror.settings import MirrorSettings, check_url

RUN = "simple.r.00000"


@pytest.fixture(params=["file", "memory"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    url = f"file://{tmp_path}/store" if request.param == "file" else "memory://store"
    yield Bucket.open(url, "simple")
    MemoryFileSystem.store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Bucket:
    return Bucket.open(f"file://{tmp_path}/store", "simple")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, None), ("", None), ("s3://bucket/prefix/", "s3://bucket/prefix"), ("/a/b/../c/", "file:///a/c"),
        ("file:///a/b", "file:///a/b"), ("gs://b?project=p", "gs://b?project=p"),
    ],
)  # fmt: skip
def test_a_url_is_made_absolute(given: str | None, used: str | None) -> None:
    assert check_url(given) == used


def test_a_relative_path_is_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_url("copies") == f"file://{tmp_path}/copies"


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket", "s3://key@bucket", "ftp://u:hunter2@h/x", "s3://b?secret=hunter2", "az://c?sig=hunter2",
        "s3://b?aws_secret_access_key=hunter2", "simplecache::s3://b", "memory://x", "s3://b\n", 7,
    ],
)  # fmt: skip
def test_a_url_with_a_secret_or_of_no_use_is_refused(url: Any) -> None:
    with pytest.raises(ConfigError) as error:
        MirrorSettings.from_config({"url": url})
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "given", [{"every_s": -1}, {"finish_timeout": "x"}, {"every_s": True}, {"takeover": 1}]
)
def test_other_values_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MirrorSettings.from_config(given)


# --- the store -------------------------------------------------------------------------------------


def test_an_object_is_created_once(bucket: Bucket) -> None:
    bucket.create("a/b.json", b"1")
    with pytest.raises(FileExistsError):
        bucket.create("a/b.json", b"2")
    assert bucket.read("a/b.json", limit_bytes=10) == b"1"
    assert bucket.names("a/") == ["a/b.json"]
    bucket.delete("a/b.json")
    bucket.delete("a/b.json")
    assert not bucket.exists("a/b.json")
    assert bucket.names("a/") == bucket.names("nothing/") == []
    bucket.probe()


def test_sizes_are_bounded(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("x", b"12345")
    with pytest.raises(OSError, match="more than 4"):
        bucket.read("x", limit_bytes=4)
    bucket.download("x", tmp_path / "x", limit_bytes=3)
    assert (tmp_path / "x").stat().st_size == 4


def test_a_store_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Any, path: str, value: bytes, mode: str = "", **more: Any) -> None:
        self.open(path, "wb", data=value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    with pytest.raises(ConfigError, match="conditional"):
        Bucket.open("memory://careless").probe()


@pytest.mark.parametrize("url", ["ftp://host/x", "sftp://host/x", "http://host/x", "zip://x", "nonsense://x"])
def test_a_kind_of_store_that_looks_first_and_then_writes_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="conditionally"):
        Bucket.open(url)


def test_a_package_that_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="gcsfs"):
        Bucket.open("gs://bucket")


# --- generations -----------------------------------------------------------------------------------


def test_generations_count_up(bucket: Bucket) -> None:
    assert generations.newest(bucket) is None
    first = generations.claim(bucket, 1)
    assert generations.newest(bucket) == first
    generations.check(bucket, 1)
    with pytest.raises(Fenced, match="just claimed"):
        generations.claim(bucket, 1)
    second = generations.claim(bucket, 2)
    assert second.token != first.token
    with pytest.raises(Fenced, match=f"{second.host} has taken over"):
        generations.check(bucket, 1)
    generations.check(bucket, 2)


def test_of_many_claims_at_once_one_is_taken(folder: Bucket) -> None:
    won: list[Generation] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        try:
            won.append(generations.claim(folder, 1))
        except Fenced:
            pass

    crew = [threading.Thread(target=claim) for _ in range(8)]
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    assert len(won) == 1
    assert generations.newest(folder) == won[0]


def test_a_claim_whose_answer_was_lost_is_ours(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Bucket.create

    def lossy(self: Bucket, name: str, data: bytes) -> None:
        create(self, name, data)
        raise FileExistsError("the client has repeated itself")

    monkeypatch.setattr(Bucket, "create", lossy)
    assert generations.claim(bucket, 1) == generations.newest(bucket)


def test_a_claim_that_was_refused_is_none(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Bucket, name: str, data: bytes) -> None:
        raise OSError("no")

    monkeypatch.setattr(Bucket, "create", refuse)
    with pytest.raises(OSError, match="no"):
        generations.claim(bucket, 1)
    assert generations.newest(bucket) is None


def test_what_is_in_a_generation_is_data(bucket: Bucket) -> None:
    bucket.write("generations/00000003.json", b'{"host": "\\u001b[2J", "claimed_at": 7, "token": null}')
    bucket.write("generations/x.json", b"{}")
    bucket.write("generations/00000002.json", b"not JSON")
    assert generations.newest(bucket) == Generation(3, "unknown", "unknown")


URL = "s3://b"
TOKEN = Token(URL, "simple", 7, "mine", is_restored=True)


@pytest.mark.parametrize(
    ("token", "newest", "step"),
    [
        (None, None, Step.CLAIM),
        (None, Generation(7, "a", "t", "x"), Step.CLAIM),
        (TOKEN, Generation(7, "a", "t", "mine"), Step.GO_ON),
        (TOKEN, Generation(7, "a", "t", "other"), Step.REFUSE),
        (TOKEN, Generation(8, "b", "t", "other"), Step.REFUSE),
        (TOKEN, Generation(6, "b", "t", "other"), Step.REFUSE),
        (TOKEN, None, Step.CLAIM),
        (Token("s3://elsewhere", "simple", 9, "mine"), Generation(8, "b", "t", "other"), Step.CLAIM),
    ],
)
def test_a_launch_goes_on_claims_or_refuses(
    token: Token | None, newest: Generation | None, step: Step
) -> None:
    assert generations.decide(token, newest, url=URL)[0] is step


# --- indexes ---------------------------------------------------------------------------------------


def index(step: int = 10, *, generation: int = 1, epoch: int = 1, sequence: int = 0) -> Index:
    entry = Entry(3, "0" * 64, str(Writer(generation, epoch)))
    return Index(RUN, Writer(generation, epoch), sequence, 1, {"run.json": entry}, {step: epoch})


def test_an_index_is_read_back_and_a_part_of_it_is_not() -> None:
    data = index().to_bytes()
    assert indexes.parse(data) == index()
    for end in range(len(data)):
        assert indexes.parse(data[:end]) is None
    assert indexes.parse(data.replace(b'"size_bytes":3', b'"size_bytes":4')) is None


@pytest.mark.parametrize(
    "bad", [{"digest": "../x"}, {"writer": "../../x"}, {"size_bytes": -1}, {"size_bytes": True}]
)
def test_an_index_with_hostile_values_is_none(bad: dict[str, Any]) -> None:
    fields = {"size_bytes": 3, "digest": "0" * 64, "writer": "00000001.00000001", **bad}
    whole = Index(RUN, Writer(1, 1), 0, 1, {"run.json": Entry(**fields)}, {})
    assert indexes.parse(whole.to_bytes()) is None


def test_the_newest_whole_index_counts(bucket: Bucket) -> None:
    for one in (
        index(sequence=9),
        index(20, epoch=2),
        index(5, generation=2),
        index(6, generation=2, sequence=1),
    ):
        bucket.write(one.name, one.to_bytes())
    bucket.write(f"runs/{RUN}/00000002.00000001.00000002.json", index(7).to_bytes()[:50])  # torn
    bucket.write(f"runs/{RUN}/00000009.00000001.00000002.json", index(8).to_bytes())  # another one's content
    bucket.write(f"runs/{RUN}/99.json", b"")
    found, names = indexes.read_newest(bucket, RUN)
    assert found is not None
    assert found.step == 6
    assert len(names) == 6


@pytest.mark.parametrize(
    ("epochs", "newest", "lineage", "keep_last", "kept"),
    [
        ({10: 1, 20: 1}, 30, ((1, 0),), 3, [10, 20]),
        ({10: 1, 20: 1}, 30, ((1, 0),), 2, [20]),
        ({10: 1, 20: 1}, 30, ((1, 0),), 1, []),
        ({10: 1, 30: 1}, 30, ((1, 0),), 3, [10]),  # of the newest step itself the new one counts
        ({10: 1, 20: 1, 30: 1}, 25, ((1, 0), (2, 20)), 3, [10, 20]),  # 30 was condemned
        ({10: 1, 20: 1}, 25, ((1, 0), (2, 10)), 3, [10]),  # 20 had lost the run
        ({10: 1}, None, (), 3, []),
    ],
)
def test_what_stays_beside_the_newest(
    epochs: dict[int, int], newest: int | None, lineage: Any, keep_last: int, kept: list[int]
) -> None:
    found = indexes.kept_steps(epochs, newest=newest, lineage=lineage, keep_last=keep_last)
    assert sorted(found) == kept


# --- copying ---------------------------------------------------------------------------------------


def subject(run_dir: Path, **changes: Any) -> Subject:
    return Subject(run_dir, **{"lease_epoch": 1, "attempt": 1, "keep_last": 3, **changes})


def copier(bucket: Bucket, generation: int = 1) -> Copier:
    return Copier(bucket, generation, lambda text: None)


def restore(bucket: Bucket, data_dir: Path) -> Path:
    """Fetch the run as a launch does, and return its directory."""
    (arrival,) = arrivals.fetch_sweep(Copy(bucket, "the url"), "simple", data_dir=data_dir)
    assert arrival.notes == (), arrival.notes
    return arrival.directory


def garbage(bucket: Bucket) -> set[str]:
    """Objects that the newest index does not need."""
    found, names = indexes.read_newest(bucket, RUN)
    assert found is not None
    return (set(bucket.names("objects/")) - found.objects()) | (set(names) - {found.name})


def without_hints(run_dir: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in tree(run_dir).items()
        if "trainer_checkpoint" not in name and not name.endswith((".incomplete", ".log"))
    }


def test_a_finished_run_comes_back_as_it_was(bucket: Bucket, there: Path, here: Path) -> None:
    run_dir = make_run(there, steps=(10,))
    work = copier(bucket)
    for step in (20, 30):
        work.copy(subject(run_dir))
        add_checkpoint(run_dir, step)
    rundir.write_result(run_dir, lease_epoch=1, state="completed", value=0.5, reason="")
    found = work.copy(subject(run_dir, is_over=True))
    assert (found.is_final, found.step, sorted(found.epochs)) == (True, 30, [10, 20, 30])
    back = restore(bucket, here)
    assert without_hints(back) == without_hints(run_dir)
    assert (back / "logs/attempt_0001.log").read_text() == "hello\n"
    assert garbage(bucket) == set()
    assert indexes.final_runs(bucket) == {RUN}


def test_a_run_that_goes_on_comes_back_at_its_checkpoint(bucket: Bucket, there: Path, here: Path) -> None:
    run_dir = make_run(there, steps=(10,))
    copier(bucket).copy(subject(run_dir, lease_epoch=5, attempt=3))
    back = restore(bucket, here)
    assert (back / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()[: 22 * 10]
    assert rundir.largest_epoch(back) == 5
    assert rundir.read_json(rundir.marker_path(back))["attempt"] == 3


def test_a_run_without_a_checkpoint_is_known_too(bucket: Bucket, there: Path, here: Path) -> None:
    copier(bucket).copy(subject(make_run(there, steps=())))
    assert steps_on_disk(restore(bucket, here) / "checkpoints") == []


def test_the_oldest_goes_and_stale_ones_are_skipped(bucket: Bucket, there: Path, here: Path) -> None:
    run_dir, work = make_run(there, steps=()), copier(bucket)
    for step in range(10, 80, 10):
        add_checkpoint(run_dir, step)
        if step != 50:
            work.copy(subject(run_dir))
    back = restore(bucket, here)
    assert [step for step, _ in steps_on_disk(back / "checkpoints")] == [70, 60, 40]
    assert garbage(bucket) == set()


def test_what_did_not_change_is_not_sent_again(
    bucket: Bucket, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(there, steps=(10,))
    copier(bucket).copy(subject(run_dir))
    sent: list[str] = []
    upload = Bucket.upload
    monkeypatch.setattr(Bucket, "upload", lambda self, name, fd: (sent.append(name), upload(self, name, fd)))
    add_checkpoint(run_dir, 20)
    copier(bucket).copy(subject(run_dir))  # another process, which reads how far the first had come
    assert len(sent) == 4  # metrics, model, state, manifest


@pytest.mark.parametrize("damage", ["bytes", "missing", "link", "manifest"])
def test_a_damaged_checkpoint_is_not_copied(bucket: Bucket, there: Path, here: Path, damage: str) -> None:
    said: list[str] = []
    run_dir = make_run(there)
    model = run_dir / "checkpoints/step_00000030/model.pth"
    if damage == "bytes":
        model.write_bytes(model.read_bytes()[::-1])
    elif damage == "manifest":
        model.with_name("MANIFEST.json").write_bytes(b"{}")
    else:
        model.unlink()
    if damage == "link":
        model.symlink_to(run_dir / "run.json")
    work = Copier(bucket, 1, said.append)
    work.copy(subject(run_dir))
    assert work.copy(subject(run_dir)).step == 20
    assert len(said) == 1
    assert "step 30 is not copied" in said[0]


def test_a_prune_during_the_upload_harms_nothing(
    bucket: Bucket, there: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(there, steps=(10,))
    whole = tree(run_dir)
    upload = Bucket.upload

    def prune_first(self: Bucket, name: str, fd: int) -> None:
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        upload(self, name, fd)

    monkeypatch.setattr(Bucket, "upload", prune_first)
    copier(bucket).copy(subject(run_dir))
    back = tree(restore(bucket, here))
    assert {k: v for k, v in back.items() if "step_" in k} == {k: v for k, v in whole.items() if "step_" in k}


# --- who may write ---------------------------------------------------------------------------------

WRITES = ("create", "write", "upload", "delete")


class Stopped(Exception):
    """The process was killed here."""


def at_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, str], None]) -> list[str]:
    """Call `act(number, name)` before each request that changes the store; returns what was done.

    What `act` itself does to the store is not counted.
    """
    done: list[str] = []
    is_acting: list[bool] = []
    for operation in WRITES:
        original = getattr(Bucket, operation)

        def counted(
            self: Bucket, name: str, *rest: Any, _original: Any = original, _kind: str = operation
        ) -> None:
            if not is_acting:
                is_acting.append(True)
                try:
                    act(len(done), name)
                finally:
                    is_acting.clear()
                done.append(f"{_kind} {name}")
            _original(self, name, *rest)

        monkeypatch.setattr(Bucket, operation, counted)
    return done


def num_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many requests the second copy of a run makes."""
    run_dir, bucket = _half_copied(tmp_path / "counted")
    with monkeypatch.context() as patch:
        done = at_write(patch, lambda number, name: None)
        copier(bucket).copy(subject(run_dir, keep_last=1))
    return len(done)


def _half_copied(where: Path) -> tuple[Path, Bucket]:
    run_dir = make_run(where / "there", steps=(10,))
    bucket = Bucket.open(f"file://{where}/store", "simple")
    generations.claim(bucket, 1)
    copier(bucket).copy(subject(run_dir))
    add_checkpoint(run_dir, 20)
    return run_dir, bucket


def test_killed_at_any_request_the_copy_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = num_writes(tmp_path, monkeypatch)
    assert total > 8
    for at in range(total):
        run_dir, bucket = _half_copied(tmp_path / str(at))

        def stop(number: int, name: str, at: int = at, bucket: Bucket = bucket) -> None:
            if number == at:
                if name.startswith(("objects/", "runs/")) and not bucket.exists(name):
                    bucket.write(name, b"a part")  # a file system has what was written so far
                raise Stopped

        with monkeypatch.context() as patch:
            at_write(patch, stop)
            with pytest.raises(Stopped):
                copier(bucket).copy(subject(run_dir, keep_last=1))
        back = restore(bucket, tmp_path / f"{at}-back")
        assert steps_on_disk(back / "checkpoints")[0][0] in (10, 20), at
        copier(bucket).copy(subject(run_dir, keep_last=1))  # the next process
        assert steps_on_disk(restore(bucket, tmp_path / f"{at}-again") / "checkpoints")[0][0] == 20, at
        assert garbage(bucket) == set(), at


def test_taken_over_at_any_request_nothing_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request may be under way when another machine claims; it must not harm what that one has read."""
    for at in range(num_writes(tmp_path, monkeypatch) - 1):
        run_dir, bucket = _half_copied(tmp_path / str(at))
        taken: list[Path] = []

        def take_over(
            number: int, name: str, *, at: int = at, bucket: Bucket = bucket, taken: list[Path] = taken
        ) -> None:
            if number == at:
                generations.claim(bucket, 2)
                taken.append(restore(bucket, tmp_path / f"{at}-new"))
                copier(bucket, 2).copy(subject(taken[0], lease_epoch=2, keep_last=1))

        with monkeypatch.context() as patch:
            done = at_write(patch, take_over)
            with pytest.raises(Fenced, match="has taken over"):
                copier(bucket).copy(subject(run_dir, keep_last=1))
        assert len(done) == at + 1  # the one that was under way
        again = restore(bucket, tmp_path / f"{at}-third")
        assert without_hints(again) == without_hints(taken[0]), at


def test_another_worker_s_copies_count(bucket: Bucket, there: Path) -> None:
    run_dir, old, new = make_run(there, steps=(10,)), copier(bucket), copier(bucket)
    old.copy(subject(run_dir))
    new.copy(subject(run_dir, lease_epoch=2))
    add_checkpoint(run_dir, 20)
    with pytest.raises(Overtaken):
        copier(bucket).copy(subject(run_dir))
    rundir.marker_path(run_dir).write_bytes(rundir.to_json({"lease_epoch": 2}))
    with pytest.raises(Overtaken):
        old.copy(subject(run_dir))


def test_a_later_owner_s_objects_have_names_of_their_own(bucket: Bucket, there: Path) -> None:
    """So a removal that an earlier owner has under way cannot hit them, though the bytes are the same."""
    run_dir = make_run(there, steps=(10,))
    first = copier(bucket).copy(subject(run_dir))
    for name in first.objects():
        assert name.split("/")[2] == "00000001.00000001"
    add_checkpoint(run_dir, 20)
    second = copier(bucket, 2).copy(subject(run_dir, lease_epoch=2))
    new = second.objects() - first.objects()
    assert new
    assert {name.split("/")[2] for name in new} == {"00000002.00000002"}


# --- at a launch -----------------------------------------------------------------------------------


def launch(url: str, data_dir: Path) -> list[str]:
    said: list[str] = []
    joining.join(url, "simple", data_dir=data_dir, say=said.append)
    return said


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def test_machines_take_over_from_each_other(url: str, folder: Bucket, there: Path, here: Path) -> None:
    assert "from now on (generation 1)" in launch(url, there)[0]
    path = generations.token_path(there, "simple")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    copier(folder).copy(subject(make_run(there)))
    assert launch(url, there) == []
    said = launch(url, here)
    assert "generation 1 held by" in said[0]
    assert "taking over as generation 2" in said[0]
    assert any("fetched (step 30)" in text for text in said)
    assert steps_on_disk(here / rundir.relative_path("simple", 0) / "checkpoints")[0][0] == 30
    with pytest.raises(Fenced) as error:
        launch(url, there)
    assert "generation 2" in str(error.value)
    assert "fresh data directory" in str(error.value)
    with pytest.raises(Fenced):
        joining.check(url, "simple", data_dir=there)
    joining.check(url, "simple", data_dir=here)
    with pytest.raises(Fenced):
        copier(folder).copy(subject(there / rundir.relative_path("simple", 0)))


def test_a_launch_that_died_while_fetching_goes_on(
    url: str, folder: Bucket, there: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(url, there)
    for number in range(2):
        copier(folder).copy(subject(make_run(there, number=number)))
    download = Bucket.download

    def fail(self: Bucket, name: str, target: Path, *, limit_bytes: int) -> None:
        if "r.00001" in name and generations.read_token(here, "simple") is not None:
            raise OSError("cut off")
        download(self, name, target, limit_bytes=limit_bytes)

    monkeypatch.setattr(Bucket, "download", fail)
    with pytest.raises(Released, match="could not be fetched"):
        launch(url, here)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="claims it"):
        joining.check(url, "simple", data_dir=here)
    said = launch(url, here)
    assert [text for text in said if "kept as it is here" in text]
    assert [text for text in said if "simple.r.00001: fetched" in text]
    assert generations.newest(folder).number == 2  # type: ignore[union-attr]


def test_a_directory_of_another_sweep_is_in_the_way(
    url: str, folder: Bucket, there: Path, here: Path
) -> None:
    launch(url, there)
    copier(folder).copy(subject(make_run(there)))
    foreign = tree(make_run(here, seed=2))
    with pytest.raises(ConfigError, match="in the way"):
        launch(url, here)
    assert not_claimed(folder, here)
    assert tree(here / rundir.relative_path("simple", 0)) == foreign
    copier(folder).copy(subject(there / rundir.relative_path("simple", 0)))


def not_claimed(bucket: Bucket, data_dir: Path) -> bool:
    """Whether the copy is still its first owner's."""
    newest = generations.newest(bucket)
    assert newest is not None
    return newest.number == 1 and generations.read_token(data_dir, "simple") is None


def test_a_directory_that_was_copied_elsewhere_and_lags_is_in_the_way(
    url: str, folder: Bucket, there: Path, here: Path
) -> None:
    launch(f"{url}2", here)
    make_run(here, steps=(10,))
    launch(url, there)
    copier(folder).copy(subject(make_run(there)))
    with pytest.raises(ConfigError, match="not as far"):
        launch(url, here)
    newest = generations.newest(folder)
    assert newest is not None
    assert newest.number == 1


def definition(epochs: int) -> dict[str, Any]:
    sweep = {"seed": 1, "metric": "loss", "direction": "minimize", "params": {}}
    return {
        "sweep": sweep,
        "trainer": {"epochs": epochs},
        "sampler": {"_target_": "optuna.samplers.TPESampler"},
    }


@pytest.mark.parametrize(
    ("terms", "error", "match"),
    [
        (Terms(definition(51)), ConfigError, "trainer.epochs: 50 → 51"),
        (Terms(definition(50), known=["simple.r.00007"]), ConfigError, "the database knows sweep"),
        (Terms(definition(50), must_resume=True), NotWell, "resume.mode=must"),
        (Terms(definition(50)), None, ""),
        (Terms(definition(50), known=[RUN]), None, ""),
    ],
)
def test_what_a_launch_would_refuse_it_refuses_before_it_claims(
    url: str, folder: Bucket, there: Path, here: Path, monkeypatch: pytest.MonkeyPatch,
    terms: Terms, error: type[Exception] | None, match: str,
) -> None:  # fmt: skip
    launch(url, there)
    config = json.dumps(definition(50)).encode()
    monkeypatch.setattr(arriving, "CONFIG", config)
    copier(folder).copy(subject(make_run(there, steps=(), config_digest=digest(config))))
    if error is None:
        assert joining.join(url, "simple", data_dir=here, say=lambda text: None, terms=terms) == [RUN]
        return
    with pytest.raises(error, match=match):
        joining.join(url, "simple", data_dir=here, say=lambda text: None, terms=terms)
    assert not_claimed(folder, here)
    assert next(rundir.run_dirs(here, "simple"), None) is None


def test_a_store_that_does_not_answer_stops_only_a_first_launch(
    url: str, there: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(url, there)

    def down(self: Bucket) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(Bucket, "probe", down)
    assert "cannot be reached" in launch(url, there)[0]
    with pytest.raises(Released, match="cannot be reached"):
        launch(url, here)


def test_a_file_that_is_no_token_is_no_token(url: str, there: Path) -> None:
    launch(url, there)
    path = generations.token_path(there, "simple")
    path.write_text('{"url": 1}')
    with pytest.raises(rundir.Damaged):
        launch(url, there)


def test_nothing_secret_is_written(
    url: str, folder: Bucket, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-4711")
    launch(url, there)
    copier(folder).copy(subject(make_run(there)))
    for root, _, files in os.walk(tmp_path):
        for name in files:
            assert b"canary-4711" not in (Path(root) / name).read_bytes()
