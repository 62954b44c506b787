"""What a launch does about the copy: claim it, fetch what this data directory lacks, or refuse.

INVARIANT: whatever can refuse comes before the claim. Who claims ends the machine that works.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sweeper import arrivals, errands, fsops, rundir
from sweeper.errors import ConfigError, NotWell, Released
from sweeper.mirror import generations
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copy
from sweeper.mirror.generations import Generation, Step, Token

_LOCK_FILE = ".mirror.lock"


@dataclass(frozen=True, slots=True)
class Terms:
    """What a launch asks of a copy before it is claimed.

    Attributes:
        config: Of the launch; the sweep that is copied must have the same definition.
        known: The runs that its database knows of; None when it does not know the sweep.
        must_resume: The launch is for nothing when no run goes on.
    """

    config: dict[str, Any]
    known: list[str] | None = None
    must_resume: bool = False


def join(
    url: str, sweep: str, *, data_dir: Path, say: Callable[[str], None], terms: Terms | None = None
) -> list[str]:
    """Make the copy of a sweep this data directory's, and fetch the runs that it holds.

    Safe to repeat after a crash at any point: what was claimed stays claimed, what was fetched is kept.

    Args:
        url: As `check_url` returns it.
        sweep: Its name.
        data_dir: Where the runs go.
        say: Takes texts for people.
        terms: What the copy must be like to be claimed.

    Returns:
        The runs that have arrived now.

    Raises:
        Fenced: Another machine holds a newer generation, or has just claimed this one.
        ConfigError: The store cannot be used, a directory here stands in the way, or the copy is of a sweep
            with another definition. The copy is whose it was.
        NotWell: No run would go on, and one must.
        Released: The store does not answer, or another launch is at it.
    """
    with _exclusively(data_dir / "sweep" / sweep):
        token = generations.read_token(data_dir, sweep)
        if token is not None and token.url != url:
            say(f"this data directory was copied to {token.url} before")
        try:
            token = _hold(url, sweep, token, data_dir=data_dir, say=say, terms=terms)
        except OSError as error:
            if token is not None and token.url == url and token.is_restored:
                say(f"the copy {url} cannot be reached ({error}); its generation is looked at again later")
                return []
            raise Released(
                f"the copy {url} cannot be reached",
                why=str(error),
                do="Check the address and the store's own credentials; nothing was started.",
            ) from error
        return [] if token.is_restored else _fetch(url, token, data_dir=data_dir, say=say)


def _hold(
    url: str,
    sweep: str,
    token: Token | None,
    *,
    data_dir: Path,
    say: Callable[[str], None],
    terms: Terms | None,
) -> Token:
    bucket = Bucket.open(url, sweep)
    bucket.probe()
    newest = generations.newest(bucket)
    step, reason = generations.decide(token, newest, url=url)
    if step is Step.REFUSE:
        raise generations.fenced(sweep, reason)
    if step is Step.GO_ON:
        assert token is not None
        return token
    offers = arrivals.look_at_sweep(Copy(bucket, url), sweep, data_dir=data_dir)
    if terms is not None:
        _check_terms(terms, sweep, offers, url=url, data_dir=data_dir)
    number = 1 if newest is None else newest.number + 1
    say(_announce(sweep, newest, number, url=url))
    mine = generations.claim(bucket, number)
    held = Token(url, sweep, number, mine.token, is_restored=False)
    generations.write_token(data_dir, held)
    return held


def _check_terms(
    terms: Terms, sweep: str, offers: Sequence[arrivals.Offer], *, url: str, data_dir: Path
) -> None:
    """Refuse what the launch would refuse once the runs are here. Raises ConfigError or NotWell."""
    if changed := _changes(terms.config, offers, url):
        raise ConfigError(
            f"the copy {url} is of a sweep {sweep!r} with another definition ({'; '.join(changed)})",
            do="Launch it as it was, or choose another name with sweep.name=. The copy was not claimed.",
        )
    wanted = [offer for offer in offers if offer.is_wanted]
    known = terms.known
    if known is not None and (strange := [o.run_id for o in wanted if o.run_id not in known]):
        raise ConfigError(
            f"the database knows sweep {sweep!r}, but not {strange[0]} of the copy {url}",
            do="Launch with a fresh data directory (data_dir=…), or another database (storage.url=…). "
            "The copy was not claimed.",
        )
    if terms.must_resume:
        here = [arrivals.standing_of(run_dir) for run_dir in rundir.run_dirs(data_dir, sweep)]
        standings = [*here, *(offer.standing for offer in wanted)]
        if not any(s is not None and s.step is not None and not s.is_final for s in standings):
            raise NotWell(
                f"neither the copy {url} nor {data_dir} has an incomplete run of sweep {sweep!r} with a checkpoint",
                why="resume.mode=must",
                do="Launch with resume.mode=auto to go on anyway. The copy was not claimed.",
            )


def _changes(config: dict[str, Any], offers: Sequence[arrivals.Offer], url: str) -> list[str]:
    """How the definition differs from that of the newest run whose configuration is one. Raises Damaged."""
    from sweeper.launch.settings import differences

    for offer in sorted(offers, key=lambda offer: (len(offer.run_id), offer.run_id), reverse=True):
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            return differences(offer.config, config)
    if offers:
        raise rundir.Damaged(f"the copy {url} has no run with the configuration of a sweep")
    return []


def _announce(sweep: str, newest: Generation | None, number: int, *, url: str) -> str:
    if newest is None:
        return f"sweep {sweep} is copied to {url} from now on (generation {number})"
    return f"found a copy of sweep {sweep} at {url}: {newest}; taking over as generation {number}"


def _fetch(url: str, token: Token, *, data_dir: Path, say: Callable[[str], None]) -> list[str]:
    source = Copy(Bucket.open(url, token.sweep), url)
    try:
        arrived = arrivals.fetch_sweep(source, token.sweep, data_dir=data_dir, say=say)
    except OSError as error:
        raise Released(
            f"the copy {url} could not be fetched",
            why=str(error),
            do="Run the same command again; what has arrived is kept.",
        ) from error
    generations.write_token(data_dir, replace(token, is_restored=True))
    return [arrival.run_id for arrival in arrived if arrival.is_new]


def check(url: str, sweep: str, *, data_dir: Path) -> None:
    """Raise Fenced when this data directory's copy was taken over. What cannot be asked is left for later.

    Raises:
        ConfigError: It never held one.
    """
    token = generations.check_token(url, sweep, data_dir=data_dir)
    assert token is not None
    with contextlib.suppress(OSError):
        newest = generations.newest(Bucket.open(url, sweep))
        if generations.decide(token, newest, url=url)[0] is Step.REFUSE and newest is not None:
            raise generations.fenced(sweep, generations.overtaken(newest, token.generation))


@contextlib.contextmanager
def _exclusively(sweep_dir: Path) -> Iterator[None]:
    """One launch a data directory at a time: two would claim one generation each."""
    os.makedirs(sweep_dir, mode=0o700, exist_ok=True)
    busy = Released(f"another launch is fetching into {sweep_dir}", do="Wait for it, or end it.")
    with fsops.held(sweep_dir / _LOCK_FILE, busy=busy):
        yield


# --- in a process of its own -------------------------------------------------------------------


def in_child(verb: str, url: str, sweep: str, *, data_dir: Path, terms: Terms | None = None) -> list[str]:
    """`join` or `check` in a child.

    Returns:
        The runs that have arrived.

    Raises:
        SystemExit: It failed and has said why; with its exit code.
    """
    arrived: list[str] = errands.send(
        "sweeper.mirror.joining", verb, url, sweep, os.path.abspath(data_dir), told=json.dumps(terms and asdict(terms))
    )  # fmt: skip
    return arrived


def _answer(arguments: list[str]) -> list[str]:
    """Do what `in_child` was asked for."""
    verb, url, sweep, data_dir = arguments
    if verb == "check":
        check(url, sweep, data_dir=Path(data_dir))
        return []
    told = json.loads(sys.stdin.buffer.read())
    terms = None if told is None else Terms(**told)
    return join(url, sweep, data_dir=Path(data_dir), say=_say, terms=terms)


def _say(text: str) -> None:
    print(f"[MIRROR] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    errands.answer(lambda: _answer(sys.argv[1:]))
