"""What launcher=vast decides: both sides of each boundary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeper.launch.vast.client import Instance, Offer
from sweeper.launch.vast.ledger import Ledger, Rental
from sweeper.launch.vast.plan import (
    LEAVE_S,
    LOST_AFTER_S,
    LastWord,
    Plan,
    Sight,
    Step,
    Word,
    bid,
    choose,
    hear,
    judge,
    left,
    query,
    usd_h,
)

GROUP = yaml.safe_load((Path(__file__).parents[2] / "conf/launcher/vast.yaml").read_text())
PLAN = Plan.of(GROUP)
BIDDING = replace(PLAN, interruptible=True)
OFFER = Offer(1, 9001, "RTX 4090", 1, 0.4, 0.2, 0.01, 0.99, "Iceland")
UP = Instance(7, "sweeper:s:x:1", "running", "running", "running", 0.4, 9001, "1x RTX 4090", 0.0)


def last(word: Word) -> LastWord:
    return LastWord(word, "so", f"finished: {word}: so (1)")


def at(seen: Instance | None = UP, **more: Any) -> Sight:
    return Sight(seen, **{"has_run": True, **more})


DOWN = replace(UP, actual="stopped", state="stopped")
BY_HAND = replace(DOWN, intended="stopped")
LOADING = replace(UP, actual="loading", state="stopped")
OVERDUE = PLAN.linger_s + LEAVE_S


@pytest.mark.parametrize(
    ("sight", "step"),
    [
        (at(), Step.WAIT),
        (at(None, num_missing=1), Step.WAIT),
        (at(None, num_missing=2), Step.REPLACE),
        (at(None, num_missing=1, last=last(Word.DONE)), Step.WAIT),
        (at(None, num_missing=2, last=last(Word.DONE)), Step.DONE),
        (at(None, num_missing=2, last=last(Word.FAILED)), Step.FAILED),
        (at(None, num_missing=2, last=last(Word.CUT)), Step.FAILED),
        (at(None, num_missing=2, last=last(Word.LOST)), Step.REPLACE),
        (at(last=last(Word.DONE), last_known_s=OVERDUE), Step.WAIT),
        (at(last=last(Word.DONE), last_known_s=OVERDUE + 1), Step.DONE),
        (at(last=last(Word.LOST), last_known_s=OVERDUE + 1), Step.REPLACE),
        (at(DOWN), Step.REPLACE),
        (at(DOWN, was_kept=True, waited_s=PLAN.up_within_s), Step.WAIT),
        (at(DOWN, was_kept=True, waited_s=PLAN.up_within_s + 1), Step.KEEP),
        (at(BY_HAND), Step.KEEP),
        (at(BY_HAND, last=last(Word.UNSAVED)), Step.KEEP),
        (at(last=last(Word.UNSAVED)), Step.WAIT),
        (at(LOADING, has_run=False, waited_s=PLAN.up_within_s), Step.WAIT),
        (at(LOADING, has_run=False, waited_s=PLAN.up_within_s + 1), Step.AVOID),
        (at(replace(UP, actual="exited"), has_run=False), Step.AVOID),
        (at(replace(UP, actual="exited")), Step.REPLACE),
        (at(silent_s=PLAN.up_within_s), Step.WAIT),
        (at(silent_s=PLAN.up_within_s + 1), Step.AVOID),
        (at(replace(UP, actual="offline"), away_s=LOST_AFTER_S), Step.WAIT),
        (at(replace(UP, actual="offline"), away_s=LOST_AFTER_S + 1), Step.REPLACE),
        (at(replace(UP, actual="unheard-of")), Step.WAIT),
    ],
)
def test_what_is_done_about_an_instance(sight: Sight, step: Step) -> None:
    decision = judge(sight, PLAN)
    assert decision.step is step, decision.reason
    assert decision.is_there == (sight.seen is not None or step is Step.WAIT)


def test_the_cheapest_that_fits_is_taken() -> None:
    dear, many = replace(OFFER, offer_id=2, usd_h=0.9), replace(OFFER, offer_id=3, num_gpus=2, usd_h=0.1)
    too_dear, same = replace(OFFER, offer_id=4, usd_h=1.01), replace(OFFER, offer_id=5, reliability=1.0)
    assert choose([dear, many, too_dear, OFFER], PLAN) == OFFER
    assert choose([OFFER, same], PLAN) == same
    assert choose([dear, OFFER], PLAN, avoid=[9001]) is None
    assert choose([dear, OFFER], PLAN, avoid=[1]) == dear
    assert choose([too_dear, many], PLAN) is None


def test_bids_stay_within_the_price() -> None:
    assert bid(OFFER, PLAN) is None
    assert bid(OFFER, BIDDING) == pytest.approx(0.24)
    assert usd_h(OFFER, BIDDING) == pytest.approx(0.25)
    assert bid(replace(OFFER, min_bid_usd_h=0.9), BIDDING) == 1.0
    assert choose([replace(OFFER, min_bid_usd_h=1.1)], BIDDING) is None
    assert choose([OFFER], replace(BIDDING, bid_usd_h=0.1)) is None
    assert "min_bid<=1" in query(BIDDING)


def test_time_and_money_are_counted_from_the_first_renting() -> None:
    fresh = left(PLAN, spent_usd=0.0, began_at_s=None, now_s=10**9)
    assert (fresh.seconds, fresh.usd, fresh.why_over) == (86400.0, 10.0, None)
    assert fresh.limit_s(0.4) == 86400.0
    assert fresh.limit_s(1.0) == 36000.0
    assert left(PLAN, spent_usd=10.0, began_at_s=0.0, now_s=1.0).why_over == "the budget is spent"
    assert left(PLAN, spent_usd=9.99, began_at_s=0.0, now_s=86399.0).why_over is None
    assert left(PLAN, spent_usd=0.0, began_at_s=0.0, now_s=86400.0).why_over == "the time limit is reached"


def test_the_last_word_of_the_last_start_counts_and_nobody_elses() -> None:
    log = "[ONSTART x] began: 5 s are left\n[ONSTART y] finished: done: no (1)\n  [ONSTART x] finished: failed: a: b (2)\n"
    assert hear(log, "x") == (["began: 5 s are left", "finished: failed: a: b (2)"], LastWord(Word.FAILED, "a: b", "finished: failed: a: b (2)"))  # fmt: skip
    assert hear(log + "[ONSTART x] began: 4 s are left\n", "x")[1] is None
    assert hear("[ONSTART x] finished: what: ever (1)\n", "x")[1] is None


def test_what_was_rented_is_found_again(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "simple", ["+sweep=simple"])
    ledger.rentals.append(Rental(1, 101, 9001, 0.4, 0.01, 60.0, 1000.0, 1000.0))
    ledger.rentals[0].book(4600.0, usd_h=0.4)
    ledger.rentals[0].book(4000.0, usd_h=0.4)  # a clock that was set back
    ledger.save()
    again = Ledger.open(tmp_path, "simple")
    assert again.series == ledger.series
    assert again.command == ["+sweep=simple"]
    assert again.spent_usd == pytest.approx(0.4)
    assert again.current == ledger.rentals[0]
    again.outcome = "done"
    again.save()
    assert Ledger.open(tmp_path, "simple").series != ledger.series
