"""Rent, follow, replace and end the instance of a sweep.

INVARIANT: another instance is rented only when no listing shows one of this series any more; two
would run one sweep. HAZARD: no answer is no answer: an instance counts as there until listings that
did come lack it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from sweeper import clock
from sweeper.errors import EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_OK, EXIT_RELEASED, NotWell
from sweeper.launch.vast import plan as planning
from sweeper.launch.vast.client import Client, Instance, VastError
from sweeper.launch.vast.ledger import Ledger, Rental
from sweeper.launch.vast.plan import (
    GONE_AFTER,
    SLACK_S,
    Decision,
    LastWord,
    Left,
    Plan,
    Sight,
    Step,
    Word,
    bid,
    choose,
    hear,
    judge,
    query,
)  # fmt: skip

END_WITHIN_S = 300.0
"""How long a destroy is tried and its confirmation awaited."""
SETTLE_S = 60.0
"""How long an instance may stay out of the listings that a `create` without an answer made."""
MAX_REFUSED = 5
"""Offers in a row that may turn out not to be there."""
MAX_BAD_STARTS = 3
"""Machines in a row that may not come up."""
TELL_EVERY_S = 60.0
LOG_LINES = 400
LEAST_SHARE = 0.02
"""Of time limit and budget: with less left nothing is rented any more."""


class Asked:
    """Whether we were told to stop. Handlers only set it; a context manager, which puts the old ones back."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Sleep, unless we are told to stop."""
        self._event.wait(seconds)


def say(text: str) -> None:
    """One line about what happens, on stderr."""
    print(f"[VAST] {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Watch:
    """What a launcher knows of its instance beyond the ledger: gone with it, and no loss."""

    rental: Rental
    num_missing: int = 0
    since_s: float = 0.0
    away_since_s: float | None = None
    is_log_read: bool = False
    last: LastWord | None = None
    heard_at_s: float = 0.0
    said: list[str] = field(default_factory=list)
    told: str = ""
    told_at_s: float = 0.0


class Renter:
    """Keeps one instance running until the sweep is complete, or may go on no longer.

    Args:
        write_script: Makes the file an instance starts with: (limit_s, is_fresh) → path.
        environment: Variables that the instance gets.
        again: The command that goes on.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, client: Client, *, write_script: Callable[[float, bool], Path],
        environment: Mapping[str, str], again: str, asked: Asked, is_detached: bool = False,
    ) -> None:  # fmt: skip
        self._plan, self._ledger, self._client = plan, ledger, client
        self._write_script, self._environment = write_script, environment
        self._again, self._asked, self._is_detached = again, asked, is_detached
        self._watch: Watch | None = None
        self._num_refused = self._num_bad_starts = 0
        self._unknown = ""

    def run(self) -> int:
        """Rent and follow; returns the exit code. Whatever fails before an instance is up leaves none."""
        try:
            self._recover()
            while True:
                if self._asked.signum is not None:
                    return self._go()
                rental = self._ledger.current
                code = self._rent() if rental is None else self._look(rental)
                if code is not None:
                    return code
                if self._ledger.current is not None:
                    self._asked.wait(self._plan.poll_s)
        except BaseException:
            rental = self._ledger.current
            if rental is not None and rental.up_at_s is None and not rental.is_ending:
                self._end(rental, "its launch failed")
            raise

    # --- renting ---------------------------------------------------------------------------

    def _recover(self) -> None:
        """Take up what an earlier launcher left."""
        rental = self._ledger.current
        if rental is None:
            return
        self._book(rental, None)
        if rental.instance_id is None and not self._settle(rental):
            return
        if rental.is_ending:
            self._end(rental, rental.why)
            return
        if rental.is_kept and rental.instance_id is not None:
            self._start_again(rental, rental.instance_id)
        else:
            say(f"going on with instance {rental.instance_id}")

    def _start_again(self, rental: Rental, instance_id: int) -> None:
        """Start what was kept, so that it completes its copy."""
        say(f"instance {instance_id} was kept ({rental.why}); it is started again")
        self._client.start(instance_id)
        rental.ignored, rental.heard, rental.is_kept, rental.was_kept = rental.heard, "", False, True
        self._ledger.save()
        began_s = clock.awake_s()
        while clock.awake_s() - began_s < SETTLE_S and self._asked.signum is None:
            seen = self._find(rental, self._listing())
            if seen is not None and seen.intended != "stopped":
                return
            self._pause()

    def _rent(self) -> int | None:
        plan, ledger = self._plan, self._ledger
        is_first = not any(rental.instance_id for rental in ledger.rentals)
        remaining = self._left()
        if remaining.why_over:
            return self._over(remaining.why_over)
        if sum(rental.instance_id is not None for rental in ledger.rentals) > plan.max_replacements:
            raise NotWell(
                f"sweep {ledger.sweep}: {plan.max_replacements} instances were replaced, and nothing is complete",
                do=f"See why (the last one: {ledger.rentals[-1].why}), raise launcher.max_replacements, and: {self._again}",
            )
        try:
            offers = self._client.search(query(plan), is_bid=plan.interruptible, disk_gb=plan.disk_gb)
            listing = self._client.instances()
        except VastError as error:
            if is_first:
                raise
            self._cannot_tell(error)
            self._asked.wait(plan.poll_s)
            return None
        if self._end_strays(listing, None):
            return None
        offer = choose(offers, plan, avoid=ledger.avoid)
        if offer is None:
            why = f"{len(offers)} offers, none at ${plan.max_usd_h:g} per hour or less that was not tried"
            if is_first:
                raise NotWell(
                    f"nothing on VastAI fits: {query(plan)}", why=why, do="Raise launcher.max_usd_h, or ask for less."
                )  # fmt: skip
            self._tell(f"nothing fits now ({why}); asked again")
            self._asked.wait(max(plan.poll_s, 1.0))
            return None
        price = planning.usd_h(offer, plan)
        limit_s = remaining.limit_s(price)
        whole_s = self._full().limit_s(price)
        slack_s = min(SLACK_S, 0.1 * whole_s)
        if limit_s < max(LEAST_SHARE * whole_s, 2 * slack_s):
            return self._over(f"only {_hours(limit_s)} are left")
        limit_s -= slack_s
        now_s = clock.wall_s()
        rental = Rental(
            len(ledger.rentals) + 1, offer.offer_id, offer.machine_id, price, offer.storage_usd_h, limit_s, now_s, now_s
        )  # fmt: skip
        path = self._write_script(limit_s, plan.fresh and is_first)
        ledger.rentals.append(rental)
        ledger.began_at_s = ledger.began_at_s or now_s
        ledger.save()
        self._create(rental, path, bid(offer, plan))
        return None

    def _create(self, rental: Rental, path: Path, bid_usd_h: float | None) -> None:
        label = self._ledger.label(rental)
        try:
            rental.instance_id = self._client.create(
                rental.offer_id, image=self._plan.image, disk_gb=self._plan.disk_gb, label=label,
                onstart=path, environment=self._environment, bid_usd_h=bid_usd_h,
            )  # fmt: skip
        except VastError as error:
            said = f"offer {rental.offer_id}: {error}"
            if error.status in (401, 403):
                self._is_gone(rental, said)
                raise
            say(said)
            if error.is_refusal or not self._settle(rental):
                self._is_gone(rental, said)
                self._ledger.avoid.append(rental.offer_id)
                self._ledger.save()
                self._num_refused += 1
                if self._num_refused >= MAX_REFUSED:
                    raise NotWell(
                        f"{self._num_refused} offers in a row could not be rented", why=f"the last: {error}",
                        do="Nothing is rented; try again later.",
                    ) from error  # fmt: skip
                return
        self._num_refused = 0
        self._ledger.save()
        end = f"it ends itself after {_hours(rental.limit_s)}"
        say(f"rented instance {rental.instance_id} ({label}) at ${rental.usd_h:.4f} per hour; {end}")

    def _settle(self, rental: Rental) -> bool:
        """Whether an instance was made by a `create` that nobody heard the answer of. Raises VastError."""
        label, began_s, num_known = self._ledger.label(rental), clock.awake_s(), 0
        while True:
            listing = self._listing()
            waited_s = clock.awake_s() - began_s
            if listing is not None:
                num_known += 1
                for instance in listing:
                    if instance.label == label:
                        rental.instance_id = instance.instance_id
                        self._ledger.save()
                        say(f"found instance {instance.instance_id} by its label {label}")
                        return True
                if num_known >= GONE_AFTER and waited_s >= SETTLE_S:
                    self._is_gone(rental, "it was never made")
                    return False
            elif waited_s > END_WITHIN_S:
                raise VastError(
                    f"nobody knows whether an instance with the label {label} is rented", why=self._unknown,
                    do="Look at `sweeper vast list` when VastAI answers again, and destroy it with `sweeper vast destroy`; "
                    f"or go on with: {self._again}",
                )  # fmt: skip
            self._pause()

    # --- following -------------------------------------------------------------------------

    def _look(self, rental: Rental) -> int | None:
        listing = self._listing()
        seen = self._find(rental, listing)
        self._book(rental, seen)
        remaining = self._left()
        # What was kept may hold the only copy: its time is over with the budget alone.
        if (why := remaining.why_over) is not None and not (rental.was_kept and remaining.usd > 0):
            self._end(rental, why)
            return self._over(why)
        if listing is None:
            return None
        self._end_strays(listing, rental)
        sight = self._sight(rental, seen)
        self._ledger.save()
        if self._is_detached and rental.up_at_s is not None:
            return self._go()
        decision = judge(sight, self._plan)
        return self._act(rental, seen, decision)

    def _find(self, rental: Rental, listing: list[Instance] | None) -> Instance | None:
        for instance in listing or ():
            if instance.instance_id != rental.instance_id:
                continue
            if instance.label != self._ledger.label(rental):
                raise NotWell(
                    f"instance {instance.instance_id} has another label now: {instance.label!r}",
                    why="somebody has changed it, and only what carries our label is ever touched",
                    do=f"Set it back (vastai label instance {instance.instance_id} {self._ledger.label(rental)}), or destroy it yourself.",
                )
            return instance
        return None

    def _sight(self, rental: Rental, seen: Instance | None) -> Sight:
        now_s = clock.awake_s()
        if self._watch is None or self._watch.rental is not rental:
            self._watch = Watch(rental, since_s=now_s)
        watch = self._watch
        watch.num_missing = 0 if seen else watch.num_missing + 1
        is_away = seen is not None and seen.actual in ("offline", "unknown")
        watch.away_since_s = (watch.away_since_s or now_s) if is_away else None
        if seen is not None and seen.is_running:
            if rental.up_at_s is None:
                rental.up_at_s, watch.since_s = clock.wall_s(), now_s
                self._num_bad_starts = 0
                say(f"instance {rental.instance_id} is up")
            rental.usd_h = max(rental.usd_h, seen.usd_h)
        if seen is not None and seen.actual in ("running", "exited", "stopped"):
            self._listen(rental, watch)
        is_silent = watch.is_log_read and not watch.said
        return Sight(
            seen, watch.num_missing, waited_s=now_s - watch.since_s, has_run=rental.up_at_s is not None,
            silent_s=now_s - watch.since_s if is_silent else 0.0,
            away_s=0.0 if watch.away_since_s is None else now_s - watch.away_since_s,
            last=watch.last, last_known_s=now_s - watch.heard_at_s, was_kept=rental.was_kept,
        )  # fmt: skip

    def _listen(self, rental: Rental, watch: Watch) -> None:
        """Read the log: what the script says, and its last word."""
        if rental.instance_id is None:
            return
        try:
            log = self._client.logs(rental.instance_id, num_lines=LOG_LINES)
        except VastError:
            return
        said, last = hear(log, self._ledger.series)
        watch.is_log_read = True
        for line in _news(watch.said, said):
            say(f"{rental.instance_id}: {line}")
        watch.said = said or watch.said
        if last is not None and last.text != rental.ignored and (watch.last is None or last != watch.last):
            watch.last, watch.heard_at_s = last, clock.awake_s()
            rental.heard = last.text

    def _act(self, rental: Rental, seen: Instance | None, decision: Decision) -> int | None:
        step, reason = decision.step, decision.reason
        if step is Step.WAIT:
            self._tell(f"instance {rental.instance_id}: {reason}")
            return None
        if step is Step.KEEP:
            return self._keep(rental, seen, reason)
        word = self._watch.last.word if self._watch and self._watch.last else None
        is_left = not self._plan.auto_shutdown and step in (Step.DONE, Step.FAILED) and word is not Word.CUT
        if is_left and decision.is_there:
            return self._leave_running(rental, step, reason)
        if decision.is_there:
            self._end(rental, reason)
        else:
            self._is_gone(rental, reason)
        if word is Word.CUT and step is Step.FAILED:
            return self._over(reason)
        if step is Step.DONE or step is Step.FAILED:
            return self._finish(step, reason)
        if step is Step.AVOID:
            self._avoid(rental)
        say(f"instance {rental.instance_id} is gone ({reason}); another takes its place")
        return None

    def _avoid(self, rental: Rental) -> None:
        self._ledger.avoid += [rental.machine_id, rental.offer_id]
        self._ledger.save()
        self._num_bad_starts += 1
        if self._num_bad_starts >= MAX_BAD_STARTS:
            raise NotWell(
                f"{MAX_BAD_STARTS} machines in a row did not come up", why=f"the last: {rental.why}",
                do="Nothing is rented. Check launcher.image, and raise launcher.up_within_s if it is a large one.",
            )  # fmt: skip

    # --- ending ----------------------------------------------------------------------------

    def _end(self, rental: Rental, why: str) -> None:
        """Destroy an instance, and see that it is gone. Raises VastError when that cannot be seen."""
        if rental.instance_id is None and not self._settle(rental):
            return
        rental.is_ending, rental.why = True, why
        self._ledger.save()
        self._destroy([rental.instance_id] if rental.instance_id else [])
        self._is_gone(rental, why)

    def _end_strays(self, listing: list[Instance], rental: Rental | None) -> bool:
        """Destroy what has a label of this series and is not `rental`: a `create` that came late."""
        own = rental.instance_id if rental else None
        strays = [
            instance.instance_id for instance in listing
            if instance.label.startswith(self._ledger.prefix) and instance.instance_id != own
        ]  # fmt: skip
        if strays:
            say(f"instances {_listed(strays)} are of this sweep, too; they are destroyed")
            self._destroy(strays)
        return bool(strays)

    def _destroy(self, numbers: list[int]) -> None:
        destroy_all(self._client, numbers, pause=self._pause)

    def _is_gone(self, rental: Rental, why: str) -> None:
        self._book(rental, None)
        rental.why, rental.gone_at_s = why, clock.wall_s()
        self._ledger.save()

    def _keep(self, rental: Rental, seen: Instance | None, reason: str) -> int:
        rental.is_kept, rental.why = True, reason
        self._ledger.save()
        day = 24 * rental.storage_usd_h
        print(
            f"sweeper: INSTANCE {rental.instance_id} IS STOPPED, NOT DESTROYED: {reason}. Its disk may hold what no copy has; "
            f"it costs ${day:.2f} a day until you decide. Go on with it: {self._again}. Look: sweeper vast logs "
            f"{rental.instance_id}. Give it up: sweeper vast destroy {rental.instance_id}",
            file=sys.stderr,
        )
        return EXIT_NOT_WELL

    def _leave_running(self, rental: Rental, step: Step, reason: str) -> int:
        say(f"sweep {self._ledger.sweep}: {step}: {reason}")
        say(
            f"instance {rental.instance_id} runs on, because launcher.auto_shutdown=false: it ends itself at its limit; "
            f"`sweeper vast destroy {rental.instance_id}` ends it now"
        )
        return EXIT_OK if step is Step.DONE else EXIT_NOT_WELL

    def _finish(self, step: Step, reason: str) -> int:
        ledger = self._ledger
        ledger.outcome = str(step)
        ledger.save()
        num = sum(rental.instance_id is not None for rental in ledger.rentals)
        say(
            f"sweep {ledger.sweep}: {step}: {reason}; {num} instance{'s' if num != 1 else ''}, ${ledger.spent_usd:.2f}, none is left"
        )
        return EXIT_OK if step is Step.DONE else EXIT_NOT_WELL

    def _over(self, why: str) -> int:
        raise NotWell(
            f"sweep {self._ledger.sweep} is not complete on VastAI", why=f"{why}; ${self._ledger.spent_usd:.2f} spent, no instance is left",
            do=f"Its copy is; raise launcher.budget_usd or launcher.time_limit_h, and: {self._again}",
        )  # fmt: skip

    def _go(self) -> int:
        """Leave the instance to itself, and say so."""
        rental = self._ledger.current
        if rental is not None:
            say(
                f"instance {rental.instance_id} goes on without this launcher, and ends itself within "
                f"{_hours(rental.limit_s)} of running. Nobody replaces it meanwhile. Follow it again: {self._again}. "
                f"End it now: sweeper vast destroy {self._ledger.sweep}"
            )
        if self._asked.signum is None:
            return EXIT_OK
        return EXIT_INTERRUPTED if self._asked.signum == signal.SIGINT else EXIT_RELEASED

    # --- small things ----------------------------------------------------------------------

    def _listing(self) -> list[Instance] | None:
        """What is rented; None when nobody knows."""
        try:
            listing = self._client.instances()
        except VastError as error:
            self._cannot_tell(error)
            return None
        self._unknown = ""
        return listing

    def _cannot_tell(self, error: VastError) -> None:
        if str(error) != self._unknown:
            self._unknown = str(error)
            say(f"VastAI does not say what is rented, so nothing is done: {error}")

    def _book(self, rental: Rental, seen: Instance | None) -> None:
        is_stopped = seen is not None and not seen.is_running and rental.up_at_s is not None
        is_stopped = is_stopped or rental.is_kept
        rental.book(clock.wall_s(), usd_h=rental.storage_usd_h if is_stopped else rental.usd_h)

    def _left(self) -> Left:
        ledger = self._ledger
        return planning.left(
            self._plan, spent_usd=ledger.spent_usd, began_at_s=ledger.began_at_s, now_s=clock.wall_s()
        )

    def _full(self) -> Left:
        return planning.left(self._plan, spent_usd=0.0, began_at_s=None, now_s=0.0)

    def _tell(self, text: str) -> None:
        """Say how it stands, when that has changed or was not said for a while."""
        now_s = clock.awake_s()
        watch = self._watch
        if watch is None or (text == watch.told and now_s - watch.told_at_s < TELL_EVERY_S):
            return
        watch.told, watch.told_at_s = text, now_s
        remaining = self._left()
        say(
            f"{text}; ${self._ledger.spent_usd:.2f} of ${self._plan.budget_usd:.2f}, {_hours(remaining.seconds)} left"
        )

    def _pause(self) -> None:
        # Not cut short by a signal: what is being settled or ended is brought to its end.
        threading.Event().wait(min(self._plan.poll_s, 5.0))


def destroy_all(client: Client, numbers: list[int], *, pause: Callable[[], None]) -> None:
    """Destroy instances and see that listings lack them.

    Raises:
        VastError: They may still be there; it says how to end them by hand.
    """
    began_s, num_missing, why = clock.awake_s(), 0, ""
    left = list(numbers)
    while left:
        try:
            there = {instance.instance_id for instance in client.instances()}
            still = [number for number in numbers if number in there]
            num_missing = 0 if still else num_missing + 1
            left = still if still else ([] if num_missing >= GONE_AFTER else left)
            why = "VastAI still lists it" if still else why
        except VastError as error:
            still, why = numbers, str(error)
        if not left:
            return
        if clock.awake_s() - began_s > END_WITHIN_S:
            by_hand = " ".join(f"vastai destroy instance {number} -y;" for number in left)
            raise VastError(
                f"INSTANCE {_listed(left)} MAY STILL RUN, AND COST: it could not be destroyed, or nobody says so",
                why=why, do=f"Destroy it by hand: {by_hand} or in VastAI's console.",
            )  # fmt: skip
        for number in still:
            try:
                client.destroy(number)
            except VastError as error:
                why = str(error)
        pause()


def _news(before: list[str], now: list[str]) -> list[str]:
    """Lines of a log's end that its earlier end did not have."""
    for at in range(len(now), 0, -1):
        if before and now[at - 1] == before[-1]:
            return now[at:]
    return now


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(0.0, seconds) / 60:.0f} min"
