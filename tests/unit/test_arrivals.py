"""Run directories from elsewhere: nothing is seen before everything was checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from arriving import Folder, add_checkpoint, make_run, tree
from hypothesis import given
from hypothesis import strategies as st

from sweeper import arrivals, checkpoints, fsops, manifests, processes, rundir
from sweeper.arrivals import Gone, Listed, Standing, Unsafe, Verdict, decide, fetch_run, fetch_sweep
from sweeper.checkpoints import steps_on_disk
from sweeper.errors import ConfigError, Released
from sweeper.rundir import Damaged

RUN = "simple.r.00000"
STEP = "checkpoints/step_00000030"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def place(data_dir: Path) -> Path:
    return data_dir / rundir.relative_path("simple", 0)


def steps(data_dir: Path) -> list[int]:
    return [step for step, _ in steps_on_disk(place(data_dir) / "checkpoints")]


def leftovers(data_dir: Path) -> list[str]:
    return [name for name in os.listdir(place(data_dir).parent) if name not in (RUN, ".arrivals.lock")]


# --- names -----------------------------------------------------------------------------------------

HOSTILE = (
    *("", ".", "..", "/", "/etc/passwd", "../run.json", "a/../b", "checkpoints/../../x", "logs/./x"),
    *("checkpoints//x", "run.json/", "a\\b", "..\\x", "C:\\x", "run.json\0", "run.json\n", "r\x1b[2Jx"),
    *("checkpoints/step_00000010/../../../x", "x" * 301, "\u202egpj.x", "ｒun.json", "checkpoints/step_00000010/"),
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_refuses_the_run(there: Path, here: Path, name: str) -> None:
    make_run(there)
    source = Folder(there, strange={name: Listed(1)})
    with pytest.raises(Unsafe):
        fetch_run(source, RUN, data_dir=here)
    assert source.fetched == []
    assert not place(here).exists()
    assert leftovers(here) == []


@given(st.text(max_size=40) | st.from_regex(r"checkpoints/[^/]*/[^/]*"))
def test_what_is_taken_stays_inside(name: str) -> None:
    try:
        taken, strange = arrivals.check_names(RUN, {name: Listed(1)})
    except Unsafe:
        return
    assert [*taken, *strange] == [name]
    assert Path(os.path.normpath(Path("/run") / name)) == Path("/run") / name
    if taken:
        assert name.count("/") <= 2


@pytest.mark.parametrize(
    "name",
    [
        "evil.py", f"{RUN}.incomplete", "checkpoints/step_1/model.pth", "checkpoints/step_00000010/.hidden",
        "checkpoints/step_00000010/deep/model.pth", "logs/attempt_1.log", ".run.json.0000.tmp", "checkpoints/.trash/x",
        "result.json.gz", "tensorboard/events.out",
    ],
)  # fmt: skip
def test_a_file_that_no_run_directory_has_is_left_alone(there: Path, here: Path, name: str) -> None:
    make_run(there)
    source = Folder(there, strange={name: Listed(1)})
    arrival = fetch_run(source, RUN, data_dir=here)
    assert any(name in note for note in arrival.notes)
    assert name not in source.fetched


@pytest.mark.parametrize(
    "files",
    [
        {f"logs/attempt_{number:05d}.log": Listed(1) for number in range(arrivals.MAX_FILES + 1)},
        {"metrics.jsonl": Listed(arrivals.MAX_RUN_BYTES + 1)},
        {"metrics.jsonl": Listed(-1)},
    ],
)
def test_too_much_is_not_taken(files: dict[str, Listed]) -> None:
    with pytest.raises(Unsafe):
        arrivals.check_names(RUN, files)


def test_what_the_disk_has_no_room_for_is_not_begun(there: Path, here: Path) -> None:
    make_run(there)
    source = Folder(there, strange={"metrics.jsonl": Listed(arrivals.MAX_RUN_BYTES - 10**6)})
    with pytest.raises(ConfigError, match="room"):
        fetch_run(source, RUN, data_dir=here)
    assert source.fetched == []


@pytest.mark.parametrize(
    "run_id", ["", "..", "simple", "simple.r.1", "Simple.r.00000", "a/b.r.00000", "other.r.00000"]
)
def test_only_runs_of_the_sweep_are_fetched(there: Path, here: Path, run_id: str) -> None:
    with pytest.raises(Unsafe):
        fetch_run(Folder(there), run_id, data_dir=here, sweep="simple")
    assert not here.exists()


# --- a whole run -----------------------------------------------------------------------------------


def test_a_run_arrives_as_it_was(there: Path, here: Path) -> None:
    make_run(there)
    arrival = fetch_run(Folder(there, lease_epoch=4, with_digests=True), RUN, data_dir=here)
    assert (arrival.is_new, arrival.step, arrival.is_final, arrival.notes) == (True, 30, False, ())
    ours, theirs = tree(place(here)), tree(place(there))
    marker = ours.pop(f"{RUN}.incomplete")
    assert b'"lease_epoch": 4' in marker
    assert {k: v for k, v in ours.items() if "pointer" not in k and "trainer_checkpoint" not in k} == {
        k: v for k, v in theirs.items() if "trainer_checkpoint" not in k
    }
    assert rundir.largest_epoch(place(here)) == 4
    assert rundir.read_owner(place(here)) is None
    assert leftovers(here) == []
    modes = {path.stat().st_mode & 0o777 for path in place(here).rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_a_finished_run_arrives_without_a_marker(there: Path, here: Path) -> None:
    make_run(there, result={})
    arrival = fetch_run(Folder(there), RUN, data_dir=here)
    assert arrival.is_final
    assert not rundir.marker_path(place(here)).exists()


@pytest.mark.parametrize(
    ("result", "epoch"),
    [({"state": "running"}, 1), ({"value": None}, 1), ({"lease_epoch": 0}, 1), ({}, 2), ({"run_id": "simple.r.00009"}, 1)],
)  # fmt: skip
def test_a_result_that_does_not_count_is_left_out(
    there: Path, here: Path, result: dict[str, object], epoch: int
) -> None:
    run_dir = make_run(there)
    whole = {
        "run_id": RUN, "lease_epoch": 1, "state": "completed", "value": 0.5, "reason": "", **result,
    }  # fmt: skip
    (run_dir / "result.json").write_bytes(rundir.to_json(whole))
    arrival = fetch_run(Folder(there, lease_epoch=epoch), RUN, data_dir=here)
    assert not arrival.is_final
    assert any("result.json" in note for note in arrival.notes)
    assert not (place(here) / "result.json").exists()
    assert rundir.marker_path(place(here)).exists()


def test_only_as_many_checkpoints_as_are_wanted(there: Path, here: Path) -> None:
    make_run(there)
    source = Folder(there)
    assert fetch_run(source, RUN, data_dir=here, num_checkpoints=1).step == 30
    assert steps(here) == [30]
    assert "checkpoints/step_00000010/model.pth" not in source.fetched


def test_a_sweep_arrives_but_for_what_is_damaged(there: Path, here: Path) -> None:
    for number in range(3):
        make_run(there, number=number)
    (there / rundir.relative_path("simple", 1) / "run.json").write_text("{}")
    said: list[str] = []
    found = fetch_sweep(Folder(there), "simple", data_dir=here, say=said.append)
    assert [arrival.run_id for arrival in found] == ["simple.r.00000", "simple.r.00002"]
    assert any("simple.r.00001 is left out" in text for text in said)


def test_when_every_run_is_damaged_that_is_an_error(there: Path, here: Path) -> None:
    (make_run(there) / "run.json").write_text("{}")
    with pytest.raises(Damaged):
        fetch_sweep(Folder(there), "simple", data_dir=here)


# --- damage ----------------------------------------------------------------------------------------


def rewrite(name: str, data: bytes) -> Callable[[str, Path], None]:
    def spoil(fetched: str, target: Path) -> None:
        if fetched == name:
            target.write_bytes(data)

    return spoil


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("run.json", b"{"), ("run.json", b"[]"), ("config.yaml", b"seed: 2\n"), ("train_config_overrides.yaml", b"- !!python/name:os.system\n"),
    ],
)  # fmt: skip
def test_a_run_without_its_identity_is_refused(there: Path, here: Path, name: str, data: bytes) -> None:
    run_dir = make_run(there)
    (run_dir / name).write_bytes(data)
    with pytest.raises(Damaged):
        fetch_run(Folder(there), RUN, data_dir=here)
    assert not place(here).exists()
    assert leftovers(here) == []


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "train_config_overrides.yaml"])
def test_a_run_that_lacks_a_file_is_refused(there: Path, here: Path, name: str) -> None:
    (make_run(there) / name).unlink()
    with pytest.raises(Damaged, match=name):
        fetch_run(Folder(there), RUN, data_dir=here)


@pytest.mark.parametrize(
    "changes", [{"run_id": "simple.r.00001"}, {"sweep": "other"}, {"number": 7}, {"wandb_run_id": "../x"}]
)
def test_an_identity_that_is_another_run_s_is_refused(
    there: Path, here: Path, changes: dict[str, object]
) -> None:
    make_run(there, **changes)
    with pytest.raises(Damaged):
        fetch_run(Folder(there), RUN, data_dir=here)
    assert not place(here).exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_walks_back(there: Path, here: Path) -> None:
    flip(make_run(there) / STEP / "model.pth")
    arrival = fetch_run(Folder(there), RUN, data_dir=here)
    assert arrival.step == 20
    assert steps(here) == [20, 10]
    assert any("step_00000030" in note and "digest" in note for note in arrival.notes)


@pytest.mark.parametrize("spoil", ["truncate", "missing", "manifest", "config", "run"])
def test_every_kind_of_damage_walks_back(there: Path, here: Path, spoil: str) -> None:
    run_dir = make_run(there, steps=(10, 20))
    if spoil == "config":
        add_checkpoint(run_dir, 30, config=b"seed: 3\n")
    elif spoil == "run":
        other = make_run(there, number=1)
        (other / STEP).rename(run_dir / STEP)
    else:
        add_checkpoint(run_dir, 30)
        if spoil == "truncate":
            (run_dir / STEP / "model.pth").write_bytes(b"x")
        elif spoil == "missing":
            (run_dir / STEP / "model.pth").unlink()
        else:
            flip(run_dir / STEP / "MANIFEST.json")
    arrival = fetch_run(Folder(there), RUN, data_dir=here)
    assert arrival.step == 20
    assert any("step_00000030" in note for note in arrival.notes)


def test_a_checkpoint_of_an_owner_that_had_lost_the_run_is_left_out(there: Path, here: Path) -> None:
    run_dir = make_run(there, steps=(10, 20, 30))
    add_checkpoint(run_dir, 15, lease_epoch=2, start=10)
    arrival = fetch_run(Folder(there), RUN, data_dir=here)
    assert arrival.step == 15
    assert steps(here) == [15, 10]


def test_when_no_checkpoint_is_valid_the_directory_says_that_some_were(there: Path, here: Path) -> None:
    run_dir = make_run(there)
    for step in (10, 20, 30):
        flip(run_dir / f"checkpoints/step_{step:08d}/model.pth")
    arrival = fetch_run(Folder(there), RUN, data_dir=here)
    assert arrival.step is None
    assert any("none of its 3 checkpoints" in note for note in arrival.notes)
    assert checkpoints.was_ever_committed(place(here) / "checkpoints")


def test_a_run_that_never_had_a_checkpoint_does_not_say_so(there: Path, here: Path) -> None:
    make_run(there, steps=())
    assert fetch_run(Folder(there), RUN, data_dir=here).step is None
    assert not checkpoints.was_ever_committed(place(here) / "checkpoints")


def test_a_metrics_log_with_another_digest_is_left_out(there: Path, here: Path) -> None:
    make_run(there)
    size = (place(there) / "metrics.jsonl").stat().st_size
    source = Folder(there, with_digests=True, on_fetch=rewrite("metrics.jsonl", b"x" * size))
    arrival = fetch_run(source, RUN, data_dir=here)
    assert any("metrics.jsonl" in note for note in arrival.notes)
    assert not (place(here) / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "hard link", "nothing"])
def test_nothing_but_a_regular_file_arrives(there: Path, here: Path, tmp_path: Path, kind: str) -> None:
    make_run(there)
    secret = tmp_path / "secret"
    secret.write_bytes((place(there) / "run.json").read_bytes())

    def put(name: str, target: Path) -> None:
        if name == "run.json":
            target.unlink()
            if kind == "symlink":
                target.symlink_to(secret)
            elif kind == "fifo":
                os.mkfifo(target)
            elif kind == "hard link":
                target.hardlink_to(secret)

    with pytest.raises(Damaged, match=r"run\.json"):
        fetch_run(Folder(there, on_fetch=put), RUN, data_dir=here)
    assert not place(here).exists()


def test_more_bytes_than_were_listed_are_refused(there: Path, here: Path) -> None:
    make_run(there)
    source = Folder(there, on_fetch=lambda name, target: target.write_bytes(target.read_bytes() + b" "))
    with pytest.raises(Damaged, match="bytes instead of"):
        fetch_run(source, RUN, data_dir=here)


# --- crashes, and others at the same time --------------------------------------------------------------


def test_a_crash_leaves_nothing_at_the_place(
    there: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(there)

    class Crash(BaseException):
        pass

    def crash(operation: str, path: Path) -> None:
        if operation == "rename" and path == place(here):
            assert not path.exists()
            raise Crash

    monkeypatch.setattr(fsops, "probe", crash)
    monkeypatch.setattr(fsops, "remove_tree", lambda path: None)  # killed: nothing is tidied
    with pytest.raises(Crash):
        fetch_run(Folder(there), RUN, data_dir=here)
    monkeypatch.undo()
    assert list(rundir.run_dirs(here)) == []
    assert len(leftovers(here)) == 1
    assert fetch_run(Folder(there), RUN, data_dir=here).is_new
    assert leftovers(here) == []


def test_two_do_not_fetch_at_once(there: Path, here: Path) -> None:
    make_run(there)
    refused: list[str] = []

    def again(name: str, target: Path) -> None:
        if name == "metrics.jsonl":
            with pytest.raises(Released) as error:
                fetch_run(Folder(there), RUN, data_dir=here)
            refused.append(str(error.value))

    assert fetch_run(Folder(there, on_fetch=again), RUN, data_dir=here).is_new
    assert len(refused) == 1


def test_a_run_that_changes_meanwhile_is_listed_again(there: Path, here: Path) -> None:
    run_dir = make_run(there)

    def prune(name: str, target: Path) -> None:
        if name == "run.json" and source.num_listings == 1:
            add_checkpoint(run_dir, 40)
            for file in (run_dir / "checkpoints/step_00000010").iterdir():
                file.unlink()

    source = Folder(there, on_fetch=prune)
    assert fetch_run(source, RUN, data_dir=here).step == 40
    assert source.num_listings == 2
    assert steps(here) == [40, 30, 20]


def test_a_run_that_never_holds_still_is_given_up(there: Path, here: Path) -> None:
    make_run(there)
    source = Folder(there, strange={"logs/attempt_0009.log": Listed(1)})
    with pytest.raises(Gone):
        fetch_run(source, RUN, data_dir=here)
    assert source.num_listings == arrivals.MAX_TRIES
    assert leftovers(here) == []


# --- what is here already --------------------------------------------------------------------------


def test_what_is_as_far_is_kept(there: Path, here: Path) -> None:
    make_run(there)
    make_run(here)
    before = tree(place(here))
    source = Folder(there)
    arrival = fetch_run(source, RUN, data_dir=here, overwrite=True)
    assert not arrival.is_new
    assert arrival.step == 30
    assert "kept" in str(arrival)
    assert tree(place(here)) == before
    assert f"{STEP}/model.pth" not in source.fetched


@pytest.mark.parametrize("kind", ["behind", "another run", "damaged"])
def test_what_differs_is_refused_and_with_overwrite_moved_aside(there: Path, here: Path, kind: str) -> None:
    make_run(there)
    ours = make_run(here, steps=(10, 20), **({"seed": 2} if kind == "another run" else {}))
    if kind == "damaged":
        (ours / "run.json").write_text("{}")
    before = tree(ours)
    with pytest.raises(ConfigError, match="in the way"):
        fetch_run(Folder(there), RUN, data_dir=here)
    assert tree(ours) == before
    arrival = fetch_run(Folder(there), RUN, data_dir=here, overwrite=True)
    assert arrival.is_new
    assert steps(here) == [30, 20, 10]
    aside = list((here / "sweep/simple/aside").iterdir())
    assert [tree(path) for path in aside] == [before]
    assert list(rundir.run_dirs(here)) == [place(here)]


def test_what_only_claimed_to_be_further_does_not_overwrite(there: Path, here: Path) -> None:
    flip(make_run(there) / STEP / "model.pth")
    make_run(here, steps=(10, 20))
    before = tree(place(here))
    assert not fetch_run(Folder(there), RUN, data_dir=here, overwrite=True).is_new
    assert tree(place(here)) == before


def test_a_living_owner_s_directory_is_not_overwritten(there: Path, here: Path) -> None:
    make_run(there)
    ours = make_run(here, steps=(10,))
    rundir.write_marker(ours, attempt=1, lease_epoch=1, owner=processes.identify(), started_at="now")
    with pytest.raises(ConfigError, match="owner"):
        fetch_run(Folder(there), RUN, data_dir=here, overwrite=True)
    assert steps(here) == [10]


def test_a_link_at_the_place_is_refused(there: Path, here: Path, tmp_path: Path) -> None:
    make_run(there)
    place(here).parent.mkdir(parents=True)
    place(here).symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a directory"):
        fetch_run(Folder(there), RUN, data_dir=here, overwrite=True)


def standing(epoch: int = 1, *, is_final: bool = False, step: int | None = 10, seed: int = 1) -> Standing:
    identity = rundir.Identity(
        run_id=RUN, sweep="simple", number=0, trial=0, params={}, seed=seed, threads=1, wandb_run_id=RUN,
        config_digest=manifests.digest(b""), code_version="1", created_at="now",
    )  # fmt: skip
    return Standing(identity, epoch, is_final, step)


@pytest.mark.parametrize(
    ("here", "offered", "verdict"),
    [
        (None, standing(), Verdict.FETCH),
        (standing(step=10), standing(step=10), Verdict.KEEP),
        (standing(step=11), standing(step=10), Verdict.KEEP),
        (standing(step=9), standing(step=10), Verdict.REFUSE),
        (standing(step=None), standing(step=0), Verdict.REFUSE),
        (standing(is_final=True, step=5), standing(step=10), Verdict.KEEP),
        (standing(step=10), standing(is_final=True, step=5), Verdict.REFUSE),
        (standing(2, step=5), standing(1, step=10), Verdict.KEEP),
        (standing(1, is_final=True), standing(2, step=0), Verdict.REFUSE),
        (standing(seed=2, step=99), standing(), Verdict.REFUSE),
        (Standing(None, 9, True, 99), standing(), Verdict.REFUSE),
    ],
)
def test_the_newest_owner_then_the_end_then_the_step_decide(
    here: Standing | None, offered: Standing, verdict: Verdict
) -> None:
    assert decide(here, offered, overwrite=False)[0] is verdict
    replaced = Verdict.REPLACE if verdict is Verdict.REFUSE else verdict
    assert decide(here, offered, overwrite=True)[0] is replaced
