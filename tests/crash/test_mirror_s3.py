"""S3 through s3fs, against moto's server on the loopback, which can be made to hold requests back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash.machines import STEPS, Machine, copied_steps, until

from sweeper import arrivals
from sweeper.errors import ConfigError, Fenced
from sweeper.mirror import generations, joining
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Server:
    """moto's S3, behind a gate.

    Attributes:
        is_open: Cleared, every request that would change something waits.
        num_waiting: How many do.
        is_careless: Conditions of requests are not seen.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.is_open = threading.Event()
        self.is_open.set()
        self.num_waiting, self.is_careless = 0, False
        self._application = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "canary-id",
            "AWS_SECRET_ACCESS_KEY": "canary-4711-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _serve(self, request: dict[str, Any], start: Any) -> Any:
        if request["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
            self.num_waiting += 1
            self.is_open.wait()
            self.num_waiting -= 1
        if self.is_careless:
            request.pop("HTTP_IF_NONE_MATCH", None)
        return self._application(request, start)

    def close(self) -> None:
        self.is_open.set()
        self._server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made
    made.close()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    import s3fs

    name = f"b{abs(hash(request.node.name))}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/copies"


def test_the_store_creates_an_object_once_and_shows_it_at_once(url: str, tmp_path: Path) -> None:
    bucket, other = Bucket.open(url, "simple"), Bucket.open(url, "simple")
    bucket.probe()
    assert other.names("") == []
    assert not other.exists("x")
    bucket.create("x", b"1")
    assert other.exists("x")
    with pytest.raises(FileExistsError):
        other.create("x", b"2")
    (tmp_path / "big").write_bytes(os.urandom(12 << 20))
    fd = os.open(tmp_path / "big", os.O_RDONLY)
    data = (tmp_path / "big").read_bytes()
    (tmp_path / "big").unlink()
    bucket.upload("objects/big", fd)
    os.close(fd)
    other.download("objects/big", tmp_path / "back", limit_bytes=20 << 20)
    assert (tmp_path / "back").read_bytes() == data
    assert other.names("") == ["objects/big", "x"]
    other.delete("objects/big")
    assert bucket.names("objects/") == []
    with pytest.raises(FileNotFoundError):
        bucket.read("objects/big", limit_bytes=1)


def test_a_server_that_ignores_conditions_is_refused(server: Server, url: str, tmp_path: Path) -> None:
    server.is_careless = True
    try:
        with pytest.raises(ConfigError, match="does not honour conditional writes"):
            joining.join(url, "simple", data_dir=tmp_path / "data", say=lambda text: None)
    finally:
        server.is_careless = False
    assert generations.newest(Bucket.open(url, "simple")) is None


def test_of_many_claims_at_once_one_is_taken(url: str) -> None:
    won: list[int] = []
    start = threading.Barrier(6)

    def claim(index: int) -> None:
        bucket = Bucket.open(url, "simple")
        start.wait()
        try:
            generations.claim(bucket, 1)
        except Fenced:
            return
        won.append(index)

    crew = [threading.Thread(target=claim, args=(index,)) for index in range(6)]
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    assert len(won) == 1


def test_a_sweep_whose_store_hangs_and_whose_mirror_is_killed(
    server: Server, url: str, tmp_path: Path
) -> None:
    """Training waits for nothing, nothing is lost, and another machine gets all of it."""
    a, bucket = Machine(tmp_path / "a", url), Bucket.open(url, "simple")
    try:
        a.open_gate(7)
        launch = a.launch("mirror.finish_timeout=2", "launcher.n_workers=1", n_trials=2)
        until(lambda: list(copied_steps(bucket).values()) == [5], "the first commit was copied", log=a.log)

        server.is_open.clear()
        a.open_gate(12)
        until(lambda: server.num_waiting, "an upload was under way", log=a.log)
        (pid,) = a.alive("sweeper.mirror.server")
        os.kill(pid, signal.SIGKILL)
        server.is_open.set()
        until(lambda: list(copied_steps(bucket).values()) == [10], "another process went on", log=a.log)
        assert "the mirror process ended (signal 9) and is started again" in a.log.read_text()

        server.is_open.clear()
        a.open_gate(10**9)
        until(
            lambda: a.log.read_text().count("→ completed") == 2, "trainings went on to their end", log=a.log
        )
        assert server.num_waiting
        a.finish(launch)
        assert "NOT everything was copied within 2 s" in a.log.read_text()
        server.is_open.set()

        a.finish(a.launch(n_trials=2))
        b = Machine(tmp_path / "b")
        found = arrivals.fetch_sweep(Copy(bucket, url), "simple", data_dir=b.data)
        assert [note for arrival in found for note in arrival.notes] == []
        assert b.finals() == a.finals()
        assert set(copied_steps(bucket).values()) == {STEPS}
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert b"canary-4711" not in written
    finally:
        server.is_open.set()
        a.end()
