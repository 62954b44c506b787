"""From Hydra's composed configuration to what is stored: frozen, checked, and without a secret."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sweeps
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sweeper.config import for_run, to_yaml
from sweeper.errors import EXIT_CONFIG, ConfigError
from sweeper.launch import command, settings
from sweeper.launch.command import prepare
from sweeper.launch.settings import Settings, differences, freeze, thread_count

CANARY = "canary-7f3a-do-not-store"
VARIABLES = (
    *("SAVE_INTERVAL", "KEEP_LAST", "TF_DIR", "TB_AUTO", "TB_PORT", "TB_HOST"),
    *("SWEEPER_STORAGE", "SWEEPER_DATA_DIR", "DATA_DIR"),
)


@pytest.fixture(scope="module")
def compose_once() -> Iterator[Callable[..., DictConfig]]:
    """Hydra's part takes a third of a second, so each choice of groups is composed once."""
    with initialize_config_module("sweeper_conf", version_base="1.3"):
        yield lru_cache(lambda *groups: compose("config", overrides=["+sweep=simple", *groups]))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


Composed = Callable[..., DictConfig]


def read(cfg: DictConfig) -> Settings:
    return settings.read(cfg, command=["+sweep=simple"])


@pytest.fixture
def composed(compose_once: Callable[..., DictConfig]) -> Composed:
    """What a launch composes, given overrides; `space` takes the place of all searched parameters."""

    def make(*overrides: str, space: dict[str, Any] | None = None) -> DictConfig:
        groups = [override for override in overrides if "." not in override.partition("=")[0]]
        cfg = copy.deepcopy(compose_once(*(group for group in groups if not group.startswith("data_dir"))))
        OmegaConf.set_struct(cfg, False)
        cfg.merge_with_dotlist([o for o in overrides if o not in groups or o.startswith("data_dir")])
        if space is not None:
            cfg.sweep.params = space
        return cfg

    return make


# --- what is read ------------------------------------------------------------------------------


def test_the_sweep_of_the_demo_is_what_it_says(composed: Composed) -> None:
    found = read(composed())
    new = found.new
    assert (new.name, new.seed, new.n_trials, new.metric, new.direction) == (
        "simple",
        0,
        20,
        "loss",
        "minimize",
    )
    assert found.storage == "sqlite:///./outputs/sweeper.db"
    assert str(found.data_dir) == "outputs"
    assert set(new.config["space"]) == {"trainer.lr", "trainer.width", "trainer.dropout"}
    assert new.grid == ()
    json.dumps(new.config)


def test_the_stored_configuration_is_plain_and_complete_without_hydra(composed: Composed) -> None:
    config = read(composed()).new.config
    assert "hydra" not in config
    assert "storage" not in config, "its URL may hold a password"
    assert "???" not in json.dumps(config)
    assert OmegaConf.create(to_yaml(for_run(config, {})).decode()).trainer.lr is not None


@pytest.mark.parametrize(("n_trials", "expected"), [(4, 4), (6, 6), (100, 6)])
def test_a_grid_has_no_more_trials_than_points(composed: Composed, n_trials: int, expected: int) -> None:
    new = read(
        composed(
            "sampler=grid",
            f"sweep.n_trials={n_trials}",
            space={"trainer.width": "choice(16, 32, 64)", "trainer.epochs": "range(1, 3)"},
        )
    ).new
    assert (len(new.grid), new.n_trials) == (6, expected)


def test_a_list_is_a_choice(composed: Composed) -> None:
    config = read(composed(space={"trainer.width": [16, 32]})).new.config
    assert json.loads(config["space"]["trainer.width"])["attributes"] == {"choices": [16, 32]}


# --- the environment is frozen -----------------------------------------------------------------


def test_defaults_from_the_environment_are_frozen_at_the_launch(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SAVE_INTERVAL": "7", "KEEP_LAST": "5", "TF_DIR": "/tmp/boards"}.items():
        monkeypatch.setenv(name, value)
    config = read(composed()).new.config
    for name in ("SAVE_INTERVAL", "KEEP_LAST", "TF_DIR"):
        monkeypatch.setenv(name, "9")
    run = OmegaConf.create(to_yaml(for_run(config, {})).decode())
    assert (run.checkpoint.every_n_steps, run.checkpoint.keep_last) == (7, 5)
    assert run.tracking.tensorboard.dir == "/tmp/boards"


def test_without_the_variables_their_defaults_are_frozen(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read(composed()).new.config
    monkeypatch.setenv("KEEP_LAST", "9")
    assert config["checkpoint"]["keep_last"] == 3
    assert config["checkpoint"]["every_n_steps"] is None


def test_a_trainers_variables_are_frozen_too_and_other_interpolations_kept(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS", "/data/one")
    config = read(
        composed("trainer.corpus=${oc.env:CORPUS}/text", "trainer.half=${trainer.batch_size}")
    ).new.config
    monkeypatch.setenv("CORPUS", "/data/two")
    run = OmegaConf.create(to_yaml(for_run(config, {"trainer.lr": 0.5})).decode())
    assert run.trainer.corpus == "/data/one/text"
    assert run.trainer.half == run.trainer.batch_size


def test_where_tensorboard_is_shown_comes_from_the_environment(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = read(composed()).new.config["tracking"]["tensorboard"]
    assert (board["auto"], board["port"], board["host"]) == (1, 6006, "localhost")
    for name, value in {"TB_AUTO": "0", "TB_PORT": "7007", "TB_HOST": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    board = read(composed()).new.config["tracking"]["tensorboard"]
    assert (board["auto"], board["port"], board["host"]) == (0, 7007, "0.0.0.0")


# --- secrets -----------------------------------------------------------------------------------

SECRETS: dict[str, list[str]] = {
    "in the trainer": ["trainer.token=${oc.env:HF_TOKEN}"],
    "in a group of ours": ["tracking.wandb.api_key=${oc.env:WANDB_API_KEY}"],
    "with a default": ["trainer.key=${oc.env:WANDB_API_KEY,none}"],
    "inside another text": ["trainer.url=https://me:${oc.env:DB_PASSWORD}@example.com"],
    "inside another interpolation": ["trainer.key=${oc.decode:${oc.env:WANDB_API_KEY}}"],
    "in a list": ["trainer.keys=['${oc.env:WANDB_API_KEY}']"],
    "in lower case": ["trainer.key=${oc.env:my_secret}"],
    "beside a variable that is frozen": ["trainer.key=${oc.env:HOME}/${oc.env:HF_TOKEN}"],
    "through another key of the trainer": [
        "trainer.token=${oc.env:HF_TOKEN}",
        "trainer.login=${trainer.token}",
    ],
    "from the trainer into a group of ours": [
        "trainer.token=${oc.env:HF_TOKEN}",
        "tracking.wandb.group=${trainer.token}",
    ],
    "through a variable that is frozen": [
        "trainer.token=${oc.env:HF_TOKEN}",
        "trainer.login=${oc.env:HOME}/${trainer.token}",
    ],
    "as the default of a variable": ["trainer.login=${oc.env:NO_SUCH_VARIABLE,${oc.env:HF_TOKEN}}"],
    "as the name of a run": ["tracking.wandb.tags=['${oc.env:HF_TOKEN}']"],
    "of a variable with PASS": ["trainer.b=${oc.env:DB_PASS}"],
    "in a URL with a password": ["trainer.c=${oc.env:DATABASE_URL}"],
    "in a URL, by a detour": ["trainer.d=${oc.env:HOME}/${trainer.c}", "trainer.c=${oc.env:DATABASE_URL}"],
    "in a URL, in a group of ours": ["tracking.wandb.group=${oc.env:DATABASE_URL}"],
}


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "my_secret"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("DB_PASS", CANARY)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:{CANARY}@db.example/x")


NAMES = {
    "HF_TOKEN": True, "WANDB_API_KEY": True, "DB_PASS": True, "PGPASSWORD": True, "MYSQL_PWD": True,
    "pwd_of_db": True, "BASIC_AUTH": True, "AUTHORIZATION": True, "SENTRY_DSN": True, "AWS_CREDS": True,
    "MY_PRIVATE_THING": True, "PWD": False, "OLDPWD": False, "GIT_AUTHOR_NAME": False, "XAUTHORITY": False,
    "HOME": False,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_known_by_the_name_of_its_variable(name: str) -> None:
    assert settings.is_secret(name, "abc") is NAMES[name]


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ("postgresql+psycopg://me:pw@db/x", True),
        ("redis://:pw@cache:6379/0", True),
        ("http://me@example.com", False),
        ("http://example.com:8080/path", False),
        ("/data/a:b@c", False),
    ],
)
def test_a_url_with_a_password_is_a_secret_whatever_its_variable_is_called(value: str, is_one: bool) -> None:
    assert settings.is_secret("WHERE", value) is is_one


@pytest.mark.parametrize("where", SECRETS)
def test_no_secret_of_the_environment_reaches_what_is_stored(
    composed: Composed, canaries: None, where: str
) -> None:
    config = read(composed(*SECRETS[where])).new.config
    assert CANARY not in json.dumps(config)
    assert CANARY.encode() not in to_yaml(for_run(config, {}))


def test_no_byte_of_database_or_run_directory_holds_a_secret(
    composed: Composed, canaries: None, tmp_path: Path
) -> None:
    overrides = [override for group in SECRETS.values() for override in group]
    found = read(composed(*overrides, f"data_dir={tmp_path}"))
    sweep, store = prepare(found)
    for _ in range(2):
        sweeps.create_directory(sweep, sweeps.must_draw(store, sweep).run, tmp_path)
    store.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"sweeper.db", "config.yaml", "run.json"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "override",
    [
        f"storage.url=postgresql://me:{CANARY}@db.example/sweeper",
        f"+storage.url=postgresql://me:{CANARY}@db.example/sweeper",
        f"++storage.url=postgresql://me:{CANARY}@db.example/sweeper",
        f"~storage.url=postgresql://me:{CANARY}@db.example/sweeper",
        f"storage={{url: 'postgresql://me:{CANARY}@db.example/sweeper'}}",
        f"+storage={{url: 'postgresql://me:{CANARY}@db.example/sweeper'}}",
        f"storage.url='postgresql://db.example/sweeper?password={CANARY}'",
    ],
)
def test_a_password_typed_in_the_storage_url_is_not_remembered_as_the_command(override: str) -> None:
    typed = ["+sweep=simple", override, "storage.allow_network_file_system=true", "trainer.epochs=2"]
    kept = command._again(typed, typed)
    assert {"trainer.epochs=2", "storage.allow_network_file_system=true"} <= set(kept)
    assert CANARY not in " ".join(kept)


def test_a_secret_kept_as_text_is_there_for_the_training(composed: Composed, canaries: None) -> None:
    config = read(composed("trainer.token=${oc.env:HF_TOKEN}")).new.config
    assert config["trainer"]["token"] == "${oc.env:HF_TOKEN}"
    assert OmegaConf.create(to_yaml(for_run(config, {})).decode()).trainer.token == CANARY


def test_a_secret_does_not_keep_its_neighbours_from_being_resolved(
    composed: Composed, canaries: None
) -> None:
    config = read(composed("tracking.wandb.api_key=${oc.env:WANDB_API_KEY}")).new.config
    assert config["tracking"]["wandb"]["project"] == "simple"


def test_a_password_in_the_storage_url_is_not_stored(composed: Composed) -> None:
    found = read(composed(f"storage.url=sqlite:////tmp/{CANARY}/x.db"))
    assert CANARY in found.storage
    assert CANARY not in json.dumps(found.new.config)


# --- what is refused ---------------------------------------------------------------------------

REFUSED: dict[str, str] = {
    "sweep.n_trials=0": "sweep.n_trials=0",
    "sweep.n_trials=many": "sweep.n_trials='many'",
    "sweep.seed=0.5": "sweep.seed=0.5",
    "sweep.direction=up": "minimize or maximize",
    "sweep.metric=''": "sweep.metric=''",
    "sweep.params=5": "sweep.params=5",
    "resume.mode=maybe": "auto, must or never",
    "resume.on_invalid=ignore": "fresh or fail",
    "checkpoint.keep_last=1": "at least 2",
    "checkpoint.every_s=0": "checkpoint.every_s=0",
    "checkpoint.every_n_steps=-1": "checkpoint.every_n_steps=-1",
    "checkpoint.every_n_steps=2.5": "checkpoint.every_n_steps=2.5",
    "checkpoint.every_n_steps=true": "checkpoint.every_n_steps=True",
    "checkpoint.every_s=often": "checkpoint.every_s='often'",
    "checkpoint.every_s=.inf": "checkpoint.every_s=inf",
    "checkpoint.keep_last=2.5": "checkpoint.keep_last=2.5",
    "checkpoint.keep_best=-1": "checkpoint.keep_best=-1",
    "checkpoint.async_save='no'": "true or false",
    "checkpoint.interval=30": "auto or null",
    "checkpoint.keep_lots=1": "There are every_n_steps, every_s,",
    "checkpoint.export_weights=5": "checkpoint.export_weights=5",
    "checkpoint.export_weights='out/{nothing}.pth'": "names 'nothing', which is not there. It may name ",
    "checkpoint.export_weights='out/{}.pth'": "names '', which is not there",
    "checkpoint.export_weights='out/{lr.pth'": "Close its braces",
    "checkpoint.export_weights=/models/x.pth": "one file for all trials",
    "checkpoint.export_weights='../{lr}.pth'": "one file for all trials",
    "retry.max_lost=-1": "retry.max_lost=-1",
    "retry.max_oom=0.5": "retry.max_oom=0.5",
    "lease.ttl_s=20": "at least three heartbeats",
    "lease.heartbeat_s=0": "lease.heartbeat_s=0",
    "lease.progress_s=-1": "lease.progress_s=-1",
    "lease.hartbeat_s=5": "grace_s, heartbeat_s, progress_s, ranks_s, ttl_s",
    "sweep.stop_after_s=0": "sweep.stop_after_s=0",
    "tracking.tensorboard.enabled=perhaps": "tracking.tensorboard.enabled='perhaps'",
    "tracking.tensorboard.auto=perhaps": "tracking.tensorboard.auto='perhaps'",
    "tracking.tensorboard.port=http": "tracking.tensorboard.port='http'",
    "launcher.gpus_per_worker=-1": "launcher.gpus_per_worker=-1",
    "launcher.n_workers=0": "launcher.n_workers=0",
    "trainer._target_=train": "my_package.my_module.train",
    "trainer._target_=my.own.train": "my.own.train cannot be imported",
    "trainer._target_=json.no_such_function": "no_such_function",
    "sweep.params={trainer.lr: 0.1}": "not a search space",
    "sweep.params={trainer.lrr: 'interval(0,1)'}": "trainer.lrr is not in the configuration",
    "sweep.params={trainer: 'interval(0,1)'}": "trainer is a group of settings",
    "sampler._target_=optuna.samplers.Nope": "cannot be used",
    "pruner._target_=os.system": "not an Optuna pruner",
    "sampler.n_start=3": "n_start",
    "sampler=grid": "cannot walk trainer.dropout",
    "tracking.wandb.mode=loud": "online, offline, disabled",
    "checkpoint.keep_last=${nowhere.to.be.found}": "cannot be resolved",
    "trainer.lr=${oc.env:NO_SUCH_VARIABLE}": "NO_SUCH_VARIABLE",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_could_only_fail_later_is_refused_now(composed: Composed, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(composed(override))
    assert REFUSED[override] in str(caught.value)
    assert caught.value.do
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_CONFIG


@pytest.mark.parametrize(
    "overrides",
    [
        ("checkpoint.export_weights='out/{stage}_{lr}.pth'",),
        ("checkpoint.export_weights='/models/{run_id}.pth'",),
        ("checkpoint.export_weights='../{trial}.pth'",),
        ("checkpoint.export_weights=/models/x.pth", "sweep.n_trials=1"),
    ],
)
def test_weights_may_be_exported_where_no_trial_replaces_another_s(
    composed: Composed, overrides: tuple[str, ...]
) -> None:
    read(composed(*overrides))


# --- the same sweep again ----------------------------------------------------------------------


def config_of(composed: Composed, *overrides: str, **more: Any) -> dict[str, Any]:
    return read(composed(*overrides, **more)).new.config


@pytest.fixture(scope="module")
def launched(compose_once: Callable[..., DictConfig]) -> dict[str, Any]:
    return read(compose_once()).new.config


SAME = [
    "sweep.n_trials=40",
    "launcher.n_workers=7",
    "retry.max_lost=3",
    "resume.mode=never",
    "checkpoint.every_s=5",
    "lease.ttl_s=90",
    "sweep.stop_after_s=60",
    "tracking.wandb.mode=disabled",
    "storage.url=sqlite:////tmp/other.db",
    "data_dir=/tmp/elsewhere",
    "sampler=random",
    "pruner=median",
]


@pytest.mark.parametrize("override", SAME)
def test_what_a_launch_may_change_under_the_same_name(
    composed: Composed, launched: dict[str, Any], override: str
) -> None:
    assert differences(launched, config_of(composed, override)) == []


CHANGED = {
    "sweep.seed=1": "sweep.seed: 0 → 1",
    "sweep.metric=accuracy": "sweep.metric: loss → accuracy",
    "sweep.direction=maximize": "sweep.direction: minimize → maximize",
    "trainer.epochs=1": "trainer.epochs: 32 → 1",
    "trainer._target_=json.dump": "trainer._target_: sweeper_train.digits.train → json.dump",
    "trainer.depth=2": "trainer.depth: absent → 2",
    "sweep.params={trainer.width: 'choice(8, 16)'}": "sweep.params.trainer.width: choice(16, 24, 32) → choice(8, 16)",
    "sweep.params={trainer.batch_size: 'range(1, 9)'}": "sweep.params.trainer.batch_size: absent → range(1, 9)",
}


@pytest.mark.parametrize("override", CHANGED)
def test_what_it_may_not_is_shown(composed: Composed, launched: dict[str, Any], override: str) -> None:
    assert CHANGED[override] in differences(launched, config_of(composed, override))


def test_a_grid_is_not_turned_into_a_search(composed: Composed) -> None:
    space = {"trainer.width": "choice(16, 32)"}
    before, after = config_of(composed, "sampler=grid", space=space), config_of(composed, space=space)
    assert [line for line in differences(before, after) if line.startswith("sampler: ")]
    assert [line for line in differences(after, before) if line.startswith("sampler: ")]


# --- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "workers", "given", "threads"),
    [(8, 2, "", 4), (8, 3, "", 2), (2, 4, "", 1), (8, 2, "3", 3), (8, 2, "0", 4), (8, 2, "many", 4)],
)
def test_cores_are_shared_out_or_omp_num_threads_says(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, given: str, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert thread_count(workers) == threads


def test_freezing_does_not_change_what_hydra_composed(composed: Composed) -> None:
    cfg = composed()
    before = OmegaConf.to_yaml(cfg)
    freeze(cfg)
    read(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert settings.OURS
