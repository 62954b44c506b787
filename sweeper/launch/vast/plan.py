"""What launcher=vast was asked for, checked; and its decisions, each with its reason. Nothing acts here."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sweeper.errors import ConfigError
from sweeper.launch.vast.client import Instance, Offer

GONE_AFTER = 2
"""Listings in a row that an instance must be missing from. One alone may be a fault of the server's."""
LOST_AFTER_S = 300.0
"""How long a host may be out of VastAI's sight before its instance is given up."""
LEAVE_S = 180.0
"""How long an instance may take to go after its last word, beyond `linger_s`; then the launcher ends it."""
SLACK_S = 60.0
"""The instance ends itself so much earlier than its launcher would."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Over HTTP even a name alone may be a token; over ssh it is none.
_CREDENTIALS = re.compile(r"https?://[^/]*@|\w+://[^/]*:[^/]*@", re.IGNORECASE)
_NOT_FOR_INSTANCES = ("VAST_API_KEY", "CONTAINER_API_KEY", "CONTAINER_ID", "PATH", "HOME")


@dataclass(frozen=True, slots=True)
class Plan:
    """The `launcher` group; its keys are explained in conf/launcher/vast.yaml."""

    n_workers: int
    gpus_per_worker: int
    ranks_per_worker: int
    gpu_name: str | None
    num_gpus: int
    max_usd_h: float
    disk_gb: float
    reliability: float
    query: str
    interruptible: bool
    bid_usd_h: float | None
    image: str
    git_url: str | None
    git_branch: str | None
    python: str | None
    setup: tuple[str, ...] | None
    data: tuple[str, ...]
    restore: tuple[str, ...]
    save: tuple[str, ...]
    env: tuple[str, ...]
    overrides: tuple[str, ...]
    budget_usd: float
    time_limit_h: float
    auto_shutdown: bool
    fresh: bool
    up_within_s: float
    max_replacements: int
    poll_s: float
    linger_s: float
    grace_s: float

    @classmethod
    def of(cls, launcher: Mapping[str, Any]) -> Plan:
        """Check the group. Raises ConfigError, naming the key."""
        given = {key: value for key, value in launcher.items() if key != "kind"}
        known = {field.name: str(field.type) for field in fields(cls)}
        for key in sorted(set(known) ^ set(given)):
            raise ConfigError(
                f"launcher.{key} is {'missing' if key in known else 'not known'}",
                do=f"launcher=vast has {', '.join(sorted(known))}.",
            )
        plan = cls(**{key: _typed(key, given[key], type_) for key, type_ in known.items()})
        plan._check()
        return plan

    def _check(self) -> None:
        positive = (
            "num_gpus", "max_usd_h", "disk_gb", "budget_usd", "time_limit_h", "up_within_s", "poll_s",
            "n_workers", "ranks_per_worker",
        )  # fmt: skip
        for key in positive:
            _need(getattr(self, key) > 0, key, getattr(self, key), "Use a number above 0.")
        for key in ("gpus_per_worker", "max_replacements", "linger_s", "grace_s"):
            _need(getattr(self, key) >= 0, key, getattr(self, key), "Use 0 or more.")
        _need(0 <= self.reliability <= 1, "reliability", self.reliability, "Use a share from 0 to 1.")
        is_name = self.gpu_name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.-]*", self.gpu_name)
        _need(is_name, "gpu_name", self.gpu_name, "Use VastAI's name of a GPU, e.g. RTX_4090.")
        _need(
            self.bid_usd_h is None or (self.interruptible and 0 < self.bid_usd_h <= self.max_usd_h),
            "bid_usd_h", self.bid_usd_h, "It needs interruptible=true, and is at most max_usd_h.",
        )  # fmt: skip
        _need(self.image, "image", self.image, "Name an image of a container.")
        _need(
            self.git_url is None or not _CREDENTIALS.search(self.git_url),
            "git_url", "…", "It has a name or password. Put a token into $GIT_TOKEN, and launcher.env=[GIT_TOKEN].",
        )  # fmt: skip
        is_option = any(str(value or "").startswith("-") for value in (self.git_url, self.git_branch))
        _need(not is_option, "git_url", self.git_url, "Neither it nor git_branch can begin with a dash.")
        _need(
            self.git_branch is None or self.git_url,
            "git_branch",
            self.git_branch,
            "It needs launcher.git_url.",
        )
        _need(
            self.python is None or self.python.startswith("/"),
            "python", self.python, "Use an absolute path in the image, or null for an environment of its own.",
        )  # fmt: skip
        for name in self.env:
            _need(
                _NAME.match(name), "env", name, "Use names of variables only; the values are taken from here."
            )
            _need(
                name not in _NOT_FOR_INSTANCES, "env", name,
                "It stays here: instances have a key of their own." if "KEY" in name else "It is the instance's own.",
            )  # fmt: skip

    @property
    def setup_lines(self) -> tuple[str, ...]:
        """What installs the code: by default the repository that was cloned."""
        if self.setup is not None:
            return self.setup
        return ("python -m pip install -e .",) if self.git_url else ()

    @property
    def time_limit_s(self) -> float:
        return self.time_limit_h * 3600.0


def _typed(key: str, value: Any, type_: str) -> Any:
    if value is None and "None" in type_:
        return None
    if type_.startswith("tuple"):
        is_good = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        _need(is_good, key, value, "Use a list of texts.")
        return tuple(value)
    if type_.startswith("bool"):
        _need(isinstance(value, bool), key, value, "Use true or false.")
        return value
    if type_.startswith("str"):
        _need(isinstance(value, str), key, value, "Use a text.")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _need(is_number and (type_ != "int" or value == int(value)), key, value, "Use a number.")
    return int(value) if type_ == "int" else float(value)


def _need(is_good: object, key: str, value: object, do: str) -> None:
    if not is_good:
        raise ConfigError(f"launcher.{key}={value!r} cannot be used", do=do)


# --- what to rent ----------------------------------------------------------------------------


def query(plan: Plan) -> str:
    """What `vastai search offers` is asked. It adds itself: verified, rentable, not external."""
    price = "min_bid" if plan.interruptible else "dph_total"
    name = [f"gpu_name={plan.gpu_name.replace(' ', '_')}"] if plan.gpu_name else []
    words = [
        *name, f"num_gpus={plan.num_gpus}", f"disk_space>={plan.disk_gb:g}", f"reliability>={plan.reliability:g}",
        f"{price}<={plan.max_usd_h:g}", plan.query.strip(),
    ]  # fmt: skip
    return " ".join(word for word in words if word)


def bid(offer: Offer, plan: Plan) -> float | None:
    """Dollars per hour to bid: what was asked for, else a fifth above the least, within max_usd_h. None: on demand."""
    if not plan.interruptible:
        return None
    return plan.bid_usd_h or min(1.2 * offer.min_bid_usd_h, plan.max_usd_h)


def usd_h(offer: Offer, plan: Plan) -> float:
    """What the offer costs per hour while it runs, its disk included."""
    offered = bid(offer, plan)
    return offer.usd_h if offered is None else offered + offer.storage_usd_h


def choose(offers: Sequence[Offer], plan: Plan, *, avoid: Collection[int] = ()) -> Offer | None:
    """The cheapest that fits; never trust that the server applied the query.

    Args:
        avoid: Offers and machines that did not come up.
    """
    fitting = [
        offer for offer in offers
        if offer.offer_id not in avoid and offer.machine_id not in avoid and offer.num_gpus == plan.num_gpus
        and 0 < usd_h(offer, plan) <= plan.max_usd_h + (offer.storage_usd_h if plan.interruptible else 0)
        and (not plan.interruptible or (bid(offer, plan) or 0) >= offer.min_bid_usd_h)
    ]  # fmt: skip
    return min(fitting, key=lambda offer: (usd_h(offer, plan), -offer.reliability), default=None)


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of time limit and budget, over all instances of a series."""

    seconds: float
    usd: float

    @property
    def why_over(self) -> str | None:
        """Which of the two is used up."""
        if self.seconds <= 0:
            return "the time limit is reached"
        return "the budget is spent" if self.usd <= 0 else None

    def limit_s(self, usd_h: float) -> float:
        """Seconds that an instance of this price may run."""
        return min(self.seconds, 3600.0 * self.usd / usd_h if usd_h > 0 else math.inf)


def left(plan: Plan, *, spent_usd: float, began_at_s: float | None, now_s: float) -> Left:
    """What is left. The time counts from the first renting on, whether something is rented or not."""
    used_s = 0.0 if began_at_s is None else max(0.0, now_s - began_at_s)
    return Left(plan.time_limit_s - used_s, plan.budget_usd - spent_usd)


# --- what an instance says -------------------------------------------------------------------


class Word(StrEnum):
    """The last word of the script on an instance (`finish` in onstart.sh)."""

    DONE = "done"  # the sweep is complete, and so is its copy
    FAILED = "failed"  # it can not be completed
    CUT = "cut"  # time limit or budget
    LOST = "lost"  # the script was killed; the instance ended itself
    STOPPED = "stopped"  # the container was told to stop
    UNSAVED = "unsaved"  # the copy is not complete: the instance is stopped, not destroyed


@dataclass(frozen=True, slots=True)
class LastWord:
    """`text` is the whole line, which tells it from that of an earlier start."""

    word: Word
    reason: str
    text: str


def hear(log: str, series: str) -> tuple[list[str], LastWord | None]:
    """What the script said in the log of an instance, without what others print, and its last word.

    What was said before the script began again does not count.
    """
    mark = f"[ONSTART {series}] "
    said = [line.partition(mark)[2].rstrip() for line in log.splitlines() if mark in line]
    last = None
    for line in said:
        found = re.match(r"finished: (\w+): (.*?)(?: \(\d+\))?$", line)
        if line.startswith("began"):
            last = None
        elif found and found[1] in list(Word):
            last = LastWord(Word(found[1]), found[2], line)
    return said, last


# --- what to do ------------------------------------------------------------------------------


class Step(StrEnum):
    """What a launcher does next about its instance."""

    WAIT = "wait"
    DONE = "done"  # it has gone, with its work done
    FAILED = "failed"  # it has gone, and another would fail as well
    REPLACE = "replace"
    AVOID = "avoid"  # replace, and do not take this machine again
    KEEP = "keep"  # it is stopped, and its disk may hold what nothing else does


@dataclass(frozen=True, slots=True)
class Decision:
    """`is_there`: the instance still has to be destroyed."""

    step: Step
    reason: str
    is_there: bool = True


@dataclass(frozen=True, slots=True)
class Sight:
    """What is known of an instance.

    Attributes:
        seen: What the last listing says; None when that does not have it.
        num_missing: Listings in a row without it. A listing that failed is none.
        waited_s: Since it was rented, or started again.
        silent_s: Since it was seen running for the first time, if its log was read and the script has not spoken.
        away_s: Since VastAI lost sight of its host.
        last: What the script said at the end, and for how long that is known.
        was_kept: Its disk may hold what nothing else does.
    """

    seen: Instance | None
    num_missing: int = 0
    waited_s: float = 0.0
    has_run: bool = False
    silent_s: float = 0.0
    away_s: float = 0.0
    last: LastWord | None = None
    last_known_s: float = 0.0
    was_kept: bool = False


_AFTER = {Word.DONE: Step.DONE, Word.FAILED: Step.FAILED, Word.CUT: Step.FAILED}


def judge(sight: Sight, plan: Plan) -> Decision:
    """What to do about an instance, and why."""
    seen, last = sight.seen, sight.last
    if seen is None:
        return _judge_missing(sight)
    is_stopped = _is_stopped(seen, has_run=sight.has_run)
    if last is not None and last.word is Word.UNSAVED and is_stopped:
        return Decision(Step.KEEP, last.reason)
    if last is not None and last.word in _AFTER:
        is_due = sight.last_known_s > plan.linger_s + LEAVE_S or not seen.is_running
        if is_due or not plan.auto_shutdown:
            return Decision(_AFTER[last.word], last.reason)
        return Decision(Step.WAIT, f"{last.word}: {last.reason}")
    if seen.is_running:
        if last is not None and sight.last_known_s > plan.linger_s + LEAVE_S:
            return Decision(Step.REPLACE, last.reason)
        if sight.silent_s > plan.up_within_s:
            return Decision(
                Step.AVOID, f"its script has not spoken {sight.silent_s:.0f} s after the container started"
            )
        return Decision(Step.WAIT, "running")
    if seen.intended == "stopped":
        return Decision(Step.KEEP, last.reason if last else "somebody has stopped it")
    if is_stopped and sight.was_kept:
        if sight.waited_s > plan.up_within_s:
            return Decision(Step.KEEP, "VastAI has no room for it on its machine")
        return Decision(Step.WAIT, "waits for room on its machine")
    if seen.actual == "exited" and not sight.has_run:
        return Decision(Step.AVOID, f"its container did not start ({seen.actual})")
    if is_stopped:
        why = "it was outbid" if plan.interruptible else "it was stopped by VastAI"
        return Decision(Step.REPLACE, f"{why} ({seen.actual or 'no state'})")
    if seen.actual in ("offline", "unknown"):
        if sight.away_s > LOST_AFTER_S:
            return Decision(Step.REPLACE, f"VastAI has not seen its host for {sight.away_s:.0f} s")
        return Decision(Step.WAIT, f"VastAI does not see its host ({seen.actual})")
    if not sight.has_run and sight.waited_s > plan.up_within_s:
        return Decision(
            Step.AVOID,
            f"it was not up {sight.waited_s:.0f} s after it was rented ({seen.actual or 'no state'})",
        )
    return Decision(Step.WAIT, seen.actual or "being provided")


def _is_stopped(seen: Instance, *, has_run: bool) -> bool:
    """HAZARD: the contract of an instance that is being provided may be `stopped`, too."""
    return seen.actual in ("stopped", "exited") or (has_run and seen.state == "stopped")


def _judge_missing(sight: Sight) -> Decision:
    if sight.num_missing < GONE_AFTER:
        return Decision(Step.WAIT, "not in the last listing")
    if sight.last is not None and sight.last.word in _AFTER:
        return Decision(_AFTER[sight.last.word], sight.last.reason, is_there=False)
    why = f"{sight.last.word}: {sight.last.reason}" if sight.last else "nobody heard why"
    return Decision(Step.REPLACE, f"it is gone ({why})", is_there=False)
