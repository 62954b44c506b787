"""Decisions of the tracker, and the feed from one log into one sink, with a sink made for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper.errors import ConfigError
from sweeper.states import Outcome, State
from sweeper.tracking import MetricsLog, TensorboardSettings, TrackingSettings, WandbSettings
from sweeper.tracking.messages import Begin, Close, End, decode, encode
from sweeper.tracking.metrics import Row
from sweeper.tracking.sinks import REOPEN_S, Feed
from sweeper.tracking.tensorboard_sink import event_dir
from sweeper.tracking.wandb_sink import (
    Farewell,
    decide_catching_up,
    decide_farewell,
    decide_identity,
    decide_mode,
)


def begin(**changes: Any) -> Begin:
    fields: dict[str, Any] = {
        "run_dir": "/data/sweep/s/runs/s.r.00001",
        "run_id": "s.r.00001",
        "sweep": "s",
        "wandb_run_id": "s.r.00001-abcd1234",
        "attempt": 1,
        "lease_epoch": 1,
        "config": {"lr": 0.1},
        "settings": TrackingSettings(),
    }
    return Begin(**{**fields, **changes})


def end(state: State = State.COMPLETED, outcome: Outcome = Outcome.COMPLETED) -> End:
    return End("s.r.00001", str(outcome), str(state))


# --- settings and messages -----------------------------------------------------------------


def test_settings_are_read_from_the_config_group() -> None:
    settings = TrackingSettings.from_config(
        {
            "wandb": {"mode": "offline", "resume": "must", "tags": ["a"], "finish_timeout": 5, "project": ""},
            "tensorboard": {"enabled": False, "dir": "/tb", "auto": True, "port": 6006},
        }
    )
    assert settings.wandb == WandbSettings(mode="offline", resume="must", tags=("a",), finish_timeout_s=5.0)
    assert settings.tensorboard == TensorboardSettings(is_enabled=False, dir="/tb")
    assert TrackingSettings.from_config({}) == TrackingSettings()
    assert TrackingSettings.from_config({"wandb": None, "tensorboard": {"enabled": None}}).is_enabled


@pytest.mark.parametrize(
    "wandb",
    [
        {"mode": "on"},
        {"resume": "auto"},
        {"resume": False},
        {"finish_timeout": "long"},
        {"init_timeout": -1},
        {"upload_checkpoints": "some"},
    ],
)
def test_bad_settings_are_refused_with_their_key(wandb: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"tracking\.wandb\.{next(iter(wandb))}"):
        TrackingSettings.from_config({"wandb": wandb})


def test_resume_true_is_read_as_allow_never_as_auto() -> None:
    assert TrackingSettings.from_config({"wandb": {"resume": True}}).wandb.resume == "allow"


@pytest.mark.parametrize(
    "message", [begin(), begin(settings=TrackingSettings(WandbSettings(tags=("a", "b")))), end(), Close()]
)
def test_messages_come_back_as_they_were_sent(message: Any) -> None:
    assert decode(encode(message)) == message


# --- decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "variable", "has_key", "expected"),
    [
        (None, None, True, "online"),
        (None, None, False, "offline"),
        (None, "disabled", True, "disabled"),
        (None, "dryrun", False, "offline"),
        ("online", "offline", False, "online"),
        ("offline", None, True, "offline"),
    ],
)
def test_mode(mode: str | None, variable: str | None, has_key: bool, expected: str) -> None:
    assert decide_mode(mode, variable=variable, has_key=has_key) == expected


@pytest.mark.parametrize(
    ("resume", "attempt", "expected"),
    [
        ("allow", 1, ("s.r.00001-abcd1234", "allow")),
        ("must", 1, ("s.r.00001-abcd1234", "allow")),
        ("must", 2, ("s.r.00001-abcd1234", "must")),
        ("never", 1, ("s.r.00001-abcd1234", "allow")),
        ("never", 3, ("s.r.00001-abcd1234-3", "allow")),
    ],
)
def test_identity(resume: str, attempt: int, expected: tuple[str, str]) -> None:
    settings = TrackingSettings(WandbSettings(resume=resume))
    assert decide_identity(begin(attempt=attempt, settings=settings)) == expected


@pytest.mark.parametrize(
    ("state", "outcome", "expected"),
    [
        (State.COMPLETED, Outcome.COMPLETED, Farewell(0, False)),
        (State.PRUNED, Outcome.PRUNED, Farewell(0, False)),
        (State.FAILED, Outcome.CRASHED, Farewell(1, False)),
        (State.FAILED, Outcome.LOST, Farewell(1, False)),
        (State.CANCELLED, Outcome.CANCELLED, Farewell(1, False)),
        (State.INTERRUPTED, Outcome.PREEMPTED, Farewell(1, True)),
        (State.INTERRUPTED, Outcome.TIMEOUT, Farewell(1, True)),
        (State.INTERRUPTED, Outcome.LOST, Farewell(1, True)),
        (State.INTERRUPTED, Outcome.CRASHED, Farewell(1, False)),
    ],
)
def test_farewell(state: State, outcome: Outcome, expected: Farewell) -> None:
    assert decide_farewell(end(state, outcome)) == expected


def test_event_dir() -> None:
    assert event_dir(begin()) == Path("/data/sweep/s/runs/s.r.00001/tensorboard")
    rooted = TrackingSettings(tensorboard=TensorboardSettings(dir="/tf"))
    assert event_dir(begin(settings=rooted)) == Path("/tf/s/s.r.00001")


# --- feeding -------------------------------------------------------------------------------


class FakeSink:
    """Keeps what it is given; fails when told to."""

    def __init__(self, next_step: int = 0, fails_at: int | None = None) -> None:
        self.next_step = next_step
        self.fails_at = fails_at
        self.rows: list[tuple[int, Row]] = []
        self.seen: list[int] = []
        self.ending = ""

    def observe(self, step: int, row: Row) -> None:
        self.seen.append(step)

    def write(self, step: int, row: Row) -> None:
        if step == self.fails_at:
            raise RuntimeError(f"no step {step}")
        self.rows.append((step, row))

    def flush(self) -> None:
        pass

    def finish(self, end: End) -> None:
        self.ending = end.state

    def abandon(self) -> None:
        self.ending = "abandoned"


class Feeding:
    """A feed with everything around it."""

    def __init__(self, path: Path, *sinks: FakeSink | Exception) -> None:
        self.waiting = list(sinks)
        self.warnings: list[str] = []
        self.is_ours = True
        self.now_s = 1000.0
        self.log = MetricsLog(path)
        self.feed = Feed(
            "W&B",
            open_sink=self.open_sink,
            log_path=path,
            may_follow=lambda: self.is_ours,
            warn=self.warnings.append,
            clock=lambda: self.now_s,
        )

    def open_sink(self) -> FakeSink:
        sink = self.waiting.pop(0)
        if isinstance(sink, Exception):
            raise sink
        return sink


@pytest.fixture
def feeding(tmp_path: Path) -> Callable[..., Feeding]:
    return lambda *sinks: Feeding(tmp_path / "metrics.jsonl", *sinks)


def test_rows_of_one_step_are_sent_as_one_when_the_step_is_complete(feeding: Callable[..., Feeding]) -> None:
    sink = FakeSink()
    it = feeding(sink)
    it.log.write(1, {"loss": 1})
    it.feed.pump()
    assert sink.rows == []
    it.log.write(1, {"accuracy": 2})
    it.log.write(2, {"loss": 3})
    it.feed.pump()
    assert sink.rows == [(1, {"loss": 1, "accuracy": 2})]
    it.feed.end(end())
    assert sink.rows == [(1, {"loss": 1, "accuracy": 2}), (2, {"loss": 3})]
    assert sink.ending == "completed"


def test_the_last_step_of_a_run_that_goes_on_is_left_to_the_next_attempt(
    feeding: Callable[..., Feeding],
) -> None:
    sink = FakeSink()
    it = feeding(sink)
    it.log.write(1, {"loss": 1})
    it.log.write(2, {"loss": 2})
    it.feed.end(end(State.INTERRUPTED, Outcome.PREEMPTED))
    assert [step for step, _ in sink.rows] == [1]
    assert sink.ending == "interrupted"


def test_steps_that_are_there_already_are_not_sent(feeding: Callable[..., Feeding]) -> None:
    sink = FakeSink(next_step=3)
    it = feeding(sink)
    for step in (1, 2, 3, 4):
        it.log.write(step, {"loss": step})
    it.feed.end(end())
    assert [step for step, _ in sink.rows] == [3, 4]
    assert sink.seen == [1, 2, 3, 4]


def test_a_sink_that_fails_is_opened_once_more_and_gets_the_whole_log(
    feeding: Callable[..., Feeding],
) -> None:
    broken, second = FakeSink(fails_at=2), FakeSink()
    it = feeding(broken, second)
    for step in (1, 2, 3):
        it.log.write(step, {"loss": step})
    it.feed.end(end())
    assert broken.ending == "abandoned"
    assert [step for step, _ in second.rows] == [1, 2, 3]
    assert second.ending == "completed"
    assert it.warnings == ["W&B failed: RuntimeError: no step 2"]


def test_a_sink_that_fails_twice_is_given_up_and_the_rest_goes_on(feeding: Callable[..., Feeding]) -> None:
    it = feeding(FakeSink(fails_at=1), FakeSink(fails_at=1))
    it.log.write(1, {"loss": 1})
    it.feed.end(end())
    it.feed.pump()
    assert len(it.warnings) == 2


def test_a_sink_that_fails_again_is_opened_a_minute_later(feeding: Callable[..., Feeding]) -> None:
    third = FakeSink()
    it = feeding(FakeSink(fails_at=1), FakeSink(fails_at=1), third)
    for step in (1, 2):
        it.log.write(step, {"loss": 1})
    it.feed.pump()
    it.now_s += REOPEN_S - 1
    it.feed.pump()
    assert third.rows == []
    it.now_s += 1
    it.feed.pump()
    assert [step for step, _ in third.rows] == [1]
    assert len(it.warnings) == 2


def test_a_sink_that_failed_is_not_opened_again_under_a_newer_owner(feeding: Callable[..., Feeding]) -> None:
    never = FakeSink()
    it = feeding(FakeSink(fails_at=1), FakeSink(fails_at=1), never)
    for step in (1, 2):
        it.log.write(step, {"loss": 1})
    it.feed.pump()
    it.is_ours = False
    it.now_s += REOPEN_S
    it.feed.pump()
    it.feed.end(end())
    assert it.waiting == [never]
    assert never.seen == []


def test_a_sink_that_cannot_be_opened_is_a_warning(feeding: Callable[..., Feeding]) -> None:
    it = feeding(OSError("disk full"))
    it.log.write(1, {"loss": 1})
    it.feed.pump()
    it.feed.end(end())
    assert it.warnings == ["W&B cannot be used for this run: OSError: disk full"]


def test_nothing_is_said_about_a_run_with_a_newer_owner(feeding: Callable[..., Feeding]) -> None:
    sink = FakeSink()
    it = feeding(sink)
    it.log.write(1, {"loss": 1})
    it.feed.pump()
    it.is_ours = False
    it.feed.end(end())
    assert sink.ending == "abandoned"
    assert sink.rows == []


def test_the_rows_of_a_newer_owner_are_not_followed(feeding: Callable[..., Feeding], tmp_path: Path) -> None:
    sink = FakeSink()
    it = feeding(sink)
    it.log.write(1, {"loss": 1})
    it.log.write(2, {"loss": 1})
    it.feed.pump()
    it.is_ours = False
    with contextlib.closing(MetricsLog(tmp_path / "metrics.jsonl")) as theirs:
        theirs.write(3, {"loss": 1})
        theirs.write(4, {"loss": 1})
    it.feed.pump()
    assert [step for step, _ in sink.rows] == [1]
    assert sink.ending == "abandoned"


@pytest.mark.parametrize(
    ("next_step", "said"),
    [
        (0, "W&B has no rows yet: those up to step 20 are sent again from metrics.jsonl"),
        (11, "W&B has rows up to step 10: those up to step 20 are sent again from metrics.jsonl"),
        (20, ""),  # the last row was held back
        (21, ""),
        (31, "W&B has rows up to step 30 already: they are not sent again"),
    ],
)
def test_what_is_said_of_rows_that_wandb_lacks_or_has(next_step: int, said: str) -> None:
    assert decide_catching_up(next_step=next_step, start_step=20) == said
