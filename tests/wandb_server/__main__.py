"""`python -m wandb_server --port 0`: serve, and print the address."""

from __future__ import annotations

import argparse
import signal
import sys

from wandb_server.serving import WandbServer


def main() -> None:
    """Serve until SIGTERM or SIGINT, or until the end of standard input."""
    parser = argparse.ArgumentParser(prog="wandb_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--until-eof", action="store_true", help="end with standard input")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with WandbServer(port=arguments.port) as server:
        print(server.url, flush=True)
        if arguments.until_eof:
            sys.stdin.read()
        else:
            signal.pause()


if __name__ == "__main__":
    main()
