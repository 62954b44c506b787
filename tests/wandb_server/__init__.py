"""A loopback W&B server for tests, which the real client and `wandb.Api` take for the real one.

In the process of a test: `with WandbServer() as server`, WANDB_BASE_URL=server.url and
WANDB_API_KEY=API_KEY. As a process of its own: `with Apart() as server`, or
`python -m wandb_server --port 0`, which prints its address; GET /debug/state is all that it knows,
and POST /debug/{fault,lift,revoke,accept,away} are its faults.

Faults, by kind of request (graphql, file_stream, upload, download, all, or the name of a GraphQL
operation), for a count or until lifted::

    server.fault("upload", delay_s=5)
    server.fault("graphql", status=503, times=2)
    server.fault("CommitArtifact", drop="after")  # it was done, and no answer came
    with server.failing("file_stream", drop="before"): ...
    with server.away(): ...                        # connections are refused
    server.revoke(); server.accept()               # the key is not valid, and is again

`server.violations` is what a client did that would harm a history: a step that is there already,
steps that go back, holes between lines, lines overwritten. `server.unknown` is what the client
asked for and is not served here.

What it does not prove about wandb.ai: how long a request takes and how many are allowed; when a
run that fell silent is called crashed; what its server does with rows that break the rules, or
with files of more than 2 GB (uploaded in parts: refused here); features that it offers to newer
clients (none are offered here); history that was exported to Parquet; teams, access rights, quotas
and retention; how soon after a commit a version is seen everywhere; that its answers stay as they
were when wandb 0.31 was current.
"""

from wandb_server.apart import Apart
from wandb_server.backend import ServerArtifact, ServerFile, ServerRun
from wandb_server.serving import API_KEY, Fault, WandbServer

__all__ = ["API_KEY", "Apart", "Fault", "ServerArtifact", "ServerFile", "ServerRun", "WandbServer"]
