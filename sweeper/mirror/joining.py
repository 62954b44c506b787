"""What a launch does about the copy: claim it, fetch what this data directory lacks, or refuse."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sweeper import arrivals
from sweeper.companion import environment
from sweeper.errors import EXIT_INTERRUPTED, EXIT_OK, Released, SweeperError
from sweeper.mirror import generations
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copy
from sweeper.mirror.generations import Generation, Step, Token

_LOCK_FILE = ".mirror.lock"


def join(url: str, sweep: str, *, data_dir: Path, say: Callable[[str], None]) -> list[str]:
    """Make the copy of a sweep this data directory's, and fetch the runs that it holds.

    Safe to repeat after a crash at any point: what was claimed stays claimed, what was fetched is kept.

    Args:
        url: As `check_url` returns it.
        sweep: Its name.
        data_dir: Where the runs go.
        say: Takes texts for people.

    Returns:
        The runs that have arrived now.

    Raises:
        Fenced: Another machine holds a newer generation, or has just claimed this one.
        ConfigError: The store cannot be used, or a directory here stands in the way.
        Released: The store does not answer, or another launch is at it.
    """
    with _exclusively(data_dir / "sweep" / sweep):
        token = generations.read_token(data_dir, sweep)
        if token is not None and token.url != url:
            say(f"this data directory was copied to {token.url} before")
        try:
            token = _hold(url, sweep, token, data_dir=data_dir, say=say)
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


def _hold(url: str, sweep: str, token: Token | None, *, data_dir: Path, say: Callable[[str], None]) -> Token:
    bucket = Bucket.open(url, sweep)
    bucket.probe()
    newest = generations.newest(bucket)
    step, reason = generations.decide(token, newest, url=url)
    if step is Step.REFUSE:
        raise generations.fenced(sweep, reason)
    if step is Step.GO_ON:
        assert token is not None
        return token
    number = 1 if newest is None else newest.number + 1
    say(_announce(sweep, newest, number, url=url))
    mine = generations.claim(bucket, number)
    held = Token(url, sweep, number, mine.token, is_restored=False)
    generations.write_token(data_dir, held)
    return held


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
    fd = os.open(sweep_dir / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Released(
                f"another launch is fetching into {sweep_dir}", do="Wait for it, or end it."
            ) from None
        yield
    finally:
        os.close(fd)


# --- in a process of its own -------------------------------------------------------------------


def in_child(verb: str, url: str, sweep: str, *, data_dir: Path) -> list[str]:
    """`join` or `check` in a child: clients of stores start threads, and a launcher that forks must have none.

    Returns:
        The runs that have arrived.

    Raises:
        SystemExit: It failed and has said why; with its exit code.
    """
    argv = [sys.executable, "-P", "-m", "sweeper.mirror.joining", verb, url, sweep, os.path.abspath(data_dir)]
    child = subprocess.run(argv, stdout=subprocess.PIPE, env=environment(), check=False)
    if child.returncode != EXIT_OK:
        raise SystemExit(child.returncode if child.returncode > 0 else 1)
    arrived: list[str] = json.loads(child.stdout)
    return arrived


def main(arguments: list[str]) -> int:
    """Do what `in_child` was asked for; the last line on stdout is the answer."""
    verb, url, sweep, data_dir = arguments
    arrived: list[str] = []
    try:
        if verb == "check":
            check(url, sweep, data_dir=Path(data_dir))
        else:
            arrived = join(url, sweep, data_dir=Path(data_dir), say=_say)
    except SweeperError as error:
        print(f"sweeper: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(json.dumps(arrived))
    return EXIT_OK


def _say(text: str) -> None:
    print(f"[MIRROR] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a client's threads may hang
