"""The run directory: names, files that are written once, and files that somebody may have damaged."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sweeper import fsops, processes, rundir
from sweeper.errors import EXIT_CONFIG, ConfigError
from sweeper.records import ParamValue
from sweeper.rundir import Damaged, Identity

IDENTITY = Identity(
    run_id="simple.r.00012", sweep="simple", number=12, trial=7, params={"trainer.lr": 0.001, "trainer.act": "relu"},
    seed=1, threads=1, wandb_run_id="simple.r.00012.abcdef01", config_digest="00", code_version="1", created_at="now",
)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / rundir.relative_path("simple", 12)
    rundir.create(path, IDENTITY, config=b"a: 1\n", overrides=rundir.overrides_yaml(IDENTITY.params))
    return path


# --- names -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True), st.integers(0, 999_999_999))
def test_a_good_name_makes_ids_that_are_read_back(name: str, number: int) -> None:
    assert rundir.check_sweep_name(name) == name
    match = rundir.RUN_ID.match(rundir.run_id(name, number))
    assert match
    assert (match[1], int(match[2])) == (name, number)


@given(st.text())
@example("")
@example("..")
@example("../up")
@example("a/b")
@example("a\n")
@example("a\0")
@example("A")
@example("-a")
@example(".a")
@example("a b")
@example("ä")
@example("a" * 65)
@example("２")
def test_a_name_is_one_safe_file_name_or_refused(name: str) -> None:
    is_safe = 1 <= len(name) <= 64 and not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    if is_safe and name[0] not in "_-":
        assert rundir.check_sweep_name(name) == name
        return
    with pytest.raises(ConfigError) as caught:
        rundir.check_sweep_name(name)
    assert caught.value.exit_code == EXIT_CONFIG
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["a"], True])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError):
        rundir.check_sweep_name(name)


# --- creating ----------------------------------------------------------------------------------


def test_a_run_directory_has_the_documented_files_for_its_owner_only(run_dir: Path, tmp_path: Path) -> None:
    assert sorted(entry.name for entry in run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "logs", "run.json", "train_config_overrides.yaml",
    ]  # fmt: skip
    for path in (run_dir, *run_dir.iterdir(), *run_dir.relative_to(tmp_path).parents):
        mode = (tmp_path / path).stat().st_mode
        if (tmp_path / path) != tmp_path:
            assert stat.S_IMODE(mode) & 0o077 == 0, path


def test_what_identifies_a_run_is_read_back(run_dir: Path) -> None:
    assert rundir.read_identity(run_dir) == IDENTITY
    assert rundir.read_overrides(run_dir) == ["trainer.act=relu", "trainer.lr=0.001"]


def test_creating_again_keeps_what_is_there(run_dir: Path) -> None:
    other = replace(IDENTITY, seed=99)
    rundir.create(run_dir, other, config=b"other", overrides=b"other")
    assert rundir.read_identity(run_dir) == IDENTITY
    assert (run_dir / rundir.CONFIG_FILE).read_bytes() == b"a: 1\n"


@pytest.mark.parametrize(
    "missing",
    [["run.json"], ["run.json", "config.yaml"], ["run.json", "train_config_overrides.yaml", "logs"]],
)
def test_a_creation_that_was_cut_short_is_finished(run_dir: Path, missing: list[str]) -> None:
    for path in map(run_dir.joinpath, missing):
        path.rmdir() if path.is_dir() else path.unlink()
    rundir.create(run_dir, IDENTITY, config=b"a: 1\n", overrides=rundir.overrides_yaml(IDENTITY.params))
    assert all(map(Path.exists, map(run_dir.joinpath, missing)))
    assert rundir.read_identity(run_dir) == IDENTITY


def test_a_link_in_the_place_of_a_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / rundir.relative_path("simple", 12)
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        rundir.create(path, IDENTITY, config=b"", overrides=b"")
    assert not list((tmp_path / "elsewhere").iterdir())


# --- reading what somebody may have damaged ----------------------------------------------------


def hostile(path: Path, kind: str) -> None:
    if kind == "link":  # to what would be good in its place
        path.touch()
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
        return
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "200 MB":
        path.touch()
        os.truncate(path, 200 << 20)
    elif kind == "deep":
        path.write_text("[" * 500_000)
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    elif kind == "list":
        path.write_text("[1]")
    elif kind == "empty":
        path.touch()


@pytest.mark.parametrize(
    "kind", ["link", "pipe", "directory", "device", "200 MB", "deep", "binary", "list", "empty"]
)
def test_a_hostile_file_is_refused_quickly_and_never_followed(run_dir: Path, kind: str) -> None:
    hostile(run_dir / rundir.RUN_FILE, kind)
    hostile(run_dir / rundir.RESULT_FILE, kind)
    with pytest.raises(Damaged, match=r"run\.json"):
        rundir.read_identity(run_dir)
    with pytest.raises(Damaged, match=r"result\.json"):
        rundir.read_result(run_dir)
    assert rundir.largest_epoch(run_dir) == 0


def test_what_is_missing_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rundir.read_identity(tmp_path)
    assert rundir.read_result(tmp_path) is None


def test_the_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert len(rundir.read_bytes(path, limit_bytes=100)) == 100
    with pytest.raises(Damaged, match="100 bytes, more than 99"):
        rundir.read_bytes(path, limit_bytes=99)


BAD_IDENTITIES: dict[str, dict[str, Any]] = {
    "another run": {"run_id": "simple.r.00013"},
    "another sweep": {"sweep": "other"},
    "another number": {"number": 13},
    "a path as id": {"run_id": "../../etc"},
    "a name with a newline": {"run_id": "simple.r.00012\n"},
    "an unknown key": {"shell": "rm -rf /"},
    "nested parameters": {"params": {"lr": {"a": 1}}},
    "parameters that are a list": {"params": [1]},
    "a trial that is a text": {"trial": "7"},
    "a trial below zero": {"trial": -1},
    "a seed that is a text": {"seed": "1; DROP TABLE"},
    "threads that are a list": {"threads": [1]},
    "a W&B id with a slash": {"wandb_run_id": "../../x"},
    "a digest that is a number": {"config_digest": 7},
    "a predecessor that is no run": {"replaces": "../x"},
    "a retry of what is no run": {"retry_of": 7},
    "a schema from the future": {"schema_version": 99},
}


@pytest.mark.parametrize("kind", BAD_IDENTITIES)
def test_an_identity_that_is_not_one_of_ours_is_refused(run_dir: Path, kind: str) -> None:
    data = {**asdict(IDENTITY), **BAD_IDENTITIES[kind]}
    (run_dir / rundir.RUN_FILE).write_text(json.dumps(data))
    with pytest.raises(Damaged, match=r"run\.json"):
        rundir.read_identity(run_dir)


@pytest.mark.parametrize(
    "key", [key for key in asdict(IDENTITY) if key not in ("replaces", "retry_of", "schema_version")]
)
def test_an_identity_without_one_of_its_keys_is_refused(run_dir: Path, key: str) -> None:
    data = asdict(IDENTITY)
    del data[key]
    (run_dir / rundir.RUN_FILE).write_text(json.dumps(data))
    with pytest.raises(Damaged):
        rundir.read_identity(run_dir)


# --- overrides: data, never executed -----------------------------------------------------------

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
basic = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=30)


@given(value=numbers | texts)
@example("true")
@example("null")
@example("")
@example("it's")
@example('say "hi"')
@example("back\\slash")
@example("quote\\'d")
@example("ends in \\")
@example("\\\\")
@example("a, b")
@example("choice(1, 2)")
@example("[1, 2]")
@example("{a: 1}")
@example("$(rm -rf /)")
@example("a=b")
@example("x y")
@example(" lead")
@example("1e-5")
@example("0x10")
@example("1_000")
@example("nan")
@example("-inf")
@example("tab\tand\nnewline")
@example("ünïcode ☃")
@example(1e-5)
@example(-0.0)
@example(1e22)
@settings(max_examples=60, deadline=None)
def test_hydra_reads_back_the_value_that_was_written(value: ParamValue) -> None:
    if isinstance(value, str) and "${" in value:
        return  # an interpolation, there as in config.yaml
    parsed = OverridesParser.create().parse_override(rundir.override("trainer.x", value))
    assert parsed.key_or_group == "trainer.x"
    assert not parsed.is_sweep_override()
    found = parsed.value()
    assert repr(getattr(found, "text", found) if not isinstance(found, str) else found) == repr(value)


@settings(max_examples=30)
@given(params=st.dictionaries(st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6})?", fullmatch=True), numbers | basic))
def test_the_overrides_file_gives_back_its_lines_to_us_and_to_any_reader_of_yaml(
    tmp_path_factory: pytest.TempPathFactory, params: dict[str, ParamValue]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    data = rundir.overrides_yaml(params)
    (directory / rundir.OVERRIDES_FILE).write_bytes(data)
    expected = [rundir.override(key, value) for key, value in sorted(params.items())]
    assert rundir.read_overrides(directory) == expected
    assert yaml.safe_load(data) == expected


@pytest.mark.parametrize(
    "text",
    [
        "- !!python/object/apply:os.system ['touch /tmp/owned']\n",
        "- &a lr=1\n- *a\n",
        '- ["nested"]\n',
        "- 7\n",
        "lr: 1\n",
        "- lr=1\n",
        '- "lr=1"\nmore\n',
    ],
)
def test_anything_but_our_own_lines_is_refused_unread(run_dir: Path, text: str) -> None:
    (run_dir / rundir.OVERRIDES_FILE).write_text(text)
    with pytest.raises(Damaged, match="not a list of overrides"):
        rundir.read_overrides(run_dir)


# --- marker and result -------------------------------------------------------------------------


def mark(run_dir: Path, epoch: int) -> None:
    rundir.write_marker(
        run_dir,
        attempt=epoch,
        lease_epoch=epoch,
        owner=processes.identify(),
        started_at="2026-01-31T12:00:00Z",
    )


def test_the_marker_names_its_owner_and_the_newest_owner_wins(run_dir: Path) -> None:
    mark(run_dir, 1)
    mark(run_dir, 2)
    data = json.loads((run_dir / "simple.r.00012.incomplete").read_text())
    assert (data["run_id"], data["attempt"], data["lease_epoch"], data["pid"]) == (
        "simple.r.00012",
        2,
        2,
        os.getpid(),
    )
    assert set(data) >= {"host", "boot_id", "pid_namespace", "pid_start", "slurm_job_id", "started_at"}
    rundir.remove_marker(run_dir)
    rundir.remove_marker(run_dir)
    assert not rundir.marker_path(run_dir).exists()


def test_a_result_is_written_once_and_what_was_there_is_kept_aside(run_dir: Path) -> None:
    rundir.write_result(run_dir, lease_epoch=1, state="failed", value=None, reason="zombie")
    rundir.write_result(run_dir, lease_epoch=2, state="completed", value=0.5, reason="")
    result = rundir.read_result(run_dir)
    assert result is not None
    assert (result["lease_epoch"], result["state"], result["value"]) == (2, "completed", 0.5)
    (aside,) = run_dir.glob("result.aside.*.json")
    assert json.loads(aside.read_text())["reason"] == "zombie"


@pytest.mark.parametrize(
    "place",
    ["marker", "result", "checkpoint", "condemned checkpoint", "partial checkpoint"],
)
def test_the_largest_epoch_is_found_wherever_it_was_written(run_dir: Path, place: str) -> None:
    root = run_dir / rundir.CHECKPOINTS_DIR
    mark(run_dir, 3)
    assert rundir.largest_epoch(run_dir) == 3
    if place == "marker":
        mark(run_dir, 9)
    elif place == "result":
        rundir.write_result(run_dir, lease_epoch=9, state="failed", value=None, reason="")
    elif place == "partial checkpoint":
        (root / ".tmp-9-abcdef01").mkdir()
    else:
        directory = root / (".condemned/step_00000005-aa" if "condemned" in place else "step_00000005")
        directory.mkdir(parents=True)
        (directory / "MANIFEST.json").write_text('{"lease_epoch": 9}')
    assert rundir.largest_epoch(run_dir) == 9


@pytest.mark.parametrize("epoch", ["9", -1, 2**60, 1.5, None, True])
def test_an_epoch_that_is_no_sensible_number_does_not_count(run_dir: Path, epoch: object) -> None:
    rundir.marker_path(run_dir).write_text(json.dumps({"lease_epoch": epoch}))
    assert rundir.largest_epoch(run_dir) in (0, 1)


# --- finding and tidying -----------------------------------------------------------------------


def test_run_directories_are_found_by_name_and_links_are_not_followed(run_dir: Path, tmp_path: Path) -> None:
    runs = run_dir.parent
    (runs / "simple.r.00013").symlink_to(run_dir)
    (runs / "simple.r.00014").write_text("")
    (runs / "notes").mkdir()
    (runs / "simple.r.00015\n").mkdir()
    (runs / "simple.r.1").mkdir()
    (tmp_path / "sweep" / "Bad Name" / "runs" / "simple.r.00016").mkdir(parents=True)
    (tmp_path / "sweep" / "other" / "runs" / "other.r.00000").mkdir(parents=True)
    found = [path.name for path in rundir.run_dirs(tmp_path)]
    assert found == ["other.r.00000", "simple.r.00012"]
    assert [path.name for path in rundir.run_dirs(tmp_path, "simple")] == ["simple.r.00012"]
    assert list(rundir.run_dirs(tmp_path / "nowhere")) == []


def test_what_a_crash_left_behind_is_removed_and_nothing_else(run_dir: Path) -> None:
    left = fsops.temporary_name(run_dir / rundir.RESULT_FILE)
    left.write_bytes(b"half")
    mine = run_dir / ".notes"
    mine.write_text("mine")
    before = {path.name for path in run_dir.iterdir()} - {left.name}
    rundir.clean(run_dir)
    assert {path.name for path in run_dir.iterdir()} == before
