"""The channel between worker and trainer: lines, ends, deadlines and fencing."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator

import pytest

from sweeper import channel as channel_module
from sweeper import clock
from sweeper.channel import Channel, ChannelClosed, WorkerLink
from sweeper.errors import Fenced


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel, socket.socket]]:
    """Worker's end, trainer's end, and the worker's raw socket."""
    ours, theirs = socket.socketpair()
    worker, trainer = Channel(ours), Channel(theirs)
    yield worker, trainer, ours
    worker.close()
    trainer.close()


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The boot clock, in a list that the test changes."""
    now = [100.0]
    monkeypatch.setattr(clock, "boot_s", lambda: now[0])
    return now


# --- messages ----------------------------------------------------------------------------------


def test_messages_arrive_whole_and_in_order(pair) -> None:
    worker, trainer, _ = pair
    trainer.send("progress", step=1, total_steps=None)
    trainer.send("report", value=math.inf, text="line\nbreak, é")
    first, second = worker.receive()
    assert first == {"kind": "progress", "step": 1, "total_steps": None}
    assert second == {"kind": "report", "value": math.inf, "text": "line\nbreak, é"}
    assert worker.receive() == []


def test_a_message_in_pieces_is_one_message(pair) -> None:
    _, trainer, raw = pair
    for piece in (b'{"kind": "st', b'op", "reas', b'on": "x"}\n{"kind"'):
        assert trainer.receive() == []
        raw.sendall(piece)
    assert trainer.receive() == [{"kind": "stop", "reason": "x"}]
    raw.sendall(b': "deadline", "at": 1}\n')
    assert trainer.receive() == [{"kind": "deadline", "at": 1}]


def test_the_last_words_are_heard_before_the_end(pair) -> None:
    worker, trainer, _ = pair
    trainer.send("result", value=1.0)
    trainer.close()
    assert worker.receive() == [{"kind": "result", "value": 1.0}]
    assert worker.is_closed


def test_half_a_message_of_a_killed_trainer_is_nothing(pair) -> None:
    worker, trainer, _ = pair
    trainer._sock.sendall(b'{"kind": "result", "val')
    trainer.close()
    assert worker.receive() == []
    assert worker.is_closed


def test_sending_to_nobody_says_so(pair) -> None:
    worker, trainer, _ = pair
    worker.close()
    with pytest.raises(ChannelClosed):
        trainer.send("progress", step=1)
    assert trainer.is_closed


def test_a_line_without_end_is_refused(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _, _ = pair
    monkeypatch.setattr(channel_module, "MAX_LINE_BYTES", 1 << 12)
    pair[1]._sock.sendall(b"x" * (1 << 13))
    with pytest.raises(ChannelClosed, match="without end"):
        worker.receive()


def test_a_message_larger_than_the_socket_buffer_arrives(pair) -> None:
    worker, trainer, _ = pair
    text = "x" * (2 << 20)
    sender = threading.Thread(target=trainer.send, args=("error",), kwargs={"detail": text})
    sender.start()
    found: list[dict] = []
    while not found:
        found = worker.receive(wait_s=5.0)
    sender.join(5.0)
    assert found[0]["detail"] == text


# --- the trainer's side ------------------------------------------------------------------------


def test_a_link_past_its_deadline_is_fenced(pair, boot: list[float]) -> None:
    worker, trainer, _ = pair
    link = WorkerLink(trainer, deadline_s=110.0)
    boot[0] = 110.0
    link.poll()
    boot[0] = 110.1
    with pytest.raises(Fenced, match="may be over"):
        link.poll()
    worker.send("deadline", at=120.0)
    link.poll()
    boot[0] = 120.1
    with pytest.raises(Fenced):
        link.poll()


def test_an_answer_from_before_a_long_stop_does_not_count(pair, boot: list[float]) -> None:
    """Worker and trainer were stopped between question and answer: the lease is over meanwhile."""
    worker, trainer, _ = pair
    link = WorkerLink(trainer, deadline_s=110.0)

    def answer() -> None:
        while not worker.receive(wait_s=5.0):
            pass
        boot[0] = 200.0
        worker.send("answer")

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(Fenced):
        link.ask("lease")
    thread.join(5.0)


def test_nothing_is_asked_past_the_deadline(pair, boot: list[float]) -> None:
    worker, trainer, _ = pair
    link = WorkerLink(trainer, deadline_s=99.0)
    with pytest.raises(Fenced):
        link.ask("committed", step=1)
    assert worker.receive() == []


def test_the_worker_fences_in_its_answer(pair, boot: list[float]) -> None:
    worker, trainer, _ = pair
    worker.send("answer", fenced="run x belongs to another owner now")
    with pytest.raises(Fenced, match="is lost") as caught:
        WorkerLink(trainer, deadline_s=110.0).ask("lease")
    assert "another owner" in caught.value.why


def test_what_comes_before_an_answer_is_taken_in(pair, boot: list[float]) -> None:
    worker, trainer, _ = pair
    link = WorkerLink(trainer, deadline_s=110.0)
    worker.send("stop", reason="the worker got SIGTERM")
    worker.send("deadline", at=150.0)
    worker.send("answer", prune=True)
    assert link.stop_reason is None
    assert link.ask("report", step=1, value=2.0)["prune"] is True
    assert link.stop_reason == "the worker got SIGTERM"
    boot[0] = 149.0
    link.poll()


def test_a_worker_that_is_gone_ends_the_question(pair, boot: list[float]) -> None:
    worker, trainer, _ = pair
    link = WorkerLink(trainer, deadline_s=110.0)
    worker.close()
    with pytest.raises(ChannelClosed):
        link.ask("lease")
    with pytest.raises(ChannelClosed):
        link.poll()
