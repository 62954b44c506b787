"""The real `vastai` client, imported once: each call is a fork of it, because importing takes half a second.

Run as `python warm.py SOCKET` it serves; run under the name `vastai` it hands its arguments,
environment and standard streams to the server at `vastai.socket` beside it, and exits as that says.
"""

import json
import os
import socket
import sys
from pathlib import Path


def ask() -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Path(sys.argv[0]).with_name("vastai.socket")))
        call = json.dumps({"argv": sys.argv, "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(call).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(call)
        return int.from_bytes(connection.recv(1) or b"\1", "big")


def serve(path: str) -> None:
    import vastai.cli.commands  # noqa: F401
    from vastai.cli import commands, main  # noqa: F401

    for name in ("instances", "offers", "misc", "billing"):
        __import__(f"vastai.cli.commands.{name}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(16)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _one(connection, main.main)
            connection.close()
            while True:
                try:
                    if os.waitpid(-1, os.WNOHANG)[0] == 0:
                        break
                except ChildProcessError:
                    break


def _one(connection: socket.socket, main) -> None:
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        connection.sendall(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
        os._exit(0)
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    size, call = int.from_bytes(head, "big"), b""
    while len(call) < size:
        call += connection.recv(size - len(call))
    for fd, target in zip(fds, (0, 1, 2), strict=True):
        os.dup2(fd, target)
    said = json.loads(call)
    os.environ.clear()
    os.environ.update(said["environment"])
    sys.argv = said["argv"]
    for module in list(sys.modules.values()):  # read once, at the import
        if hasattr(module, "server_url_default"):
            module.server_url_default = os.environ["VAST_URL"]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:  # noqa: BLE001 - what Python does with it
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if Path(sys.argv[0]).name == "vastai":
        sys.exit(ask())
    serve(sys.argv[1])
