"""Command: draw digits in the browser and see what a model says: python -m mnist_exp.draw --model latest."""

import argparse
import socket

from mnist_exp.cli import reported_errors
from mnist_exp.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")
SECONDS_TO_END = 2  # for requests that are still answered after Ctrl-C


def main() -> None:
    """Parse the command line, load the model, serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.draw", description=__doc__)
    parser.add_argument(
        "--model", default="latest", help="a run (its id, or the first 6 or more digits), latest, models:/NAME@ALIAS, or a folder"
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK[0],
        help="a name or address of this machine at which others reach it (default: this machine only)",
    )
    parser.add_argument("--port", type=port, default=8000)
    arguments = parser.parse_args()
    with reported_errors():
        import uvicorn

        from mnist_exp.serving import load
        from mnist_exp.serving.page import create_app

        refuse_unusable(arguments.host, arguments.port)
        classifier = load(arguments.model)
        hosts = host_headers(arguments.host, arguments.port)
        print(f"http://{arguments.host}:{arguments.port}", flush=True)
        print(f"Model: {classifier.source.title}", flush=True)
        uvicorn.run(
            create_app(classifier, hosts),
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            timeout_graceful_shutdown=SECONDS_TO_END,
        )


def port(text: str) -> int:
    """Return the number of a port."""
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected an integer from 1 to 65535")
    return int(text)


def host_headers(host: str, number: int) -> frozenset[str]:
    """Return the values of the header `Host` with which browsers ask at an address."""
    names = {host, *(LOOPBACK if host in LOOPBACK else ())}
    return frozenset(name if number == 80 else f"{name}:{number}" for name in names)


def refuse_unusable(host: str, number: int) -> None:
    """Raise UserError unless the page can be served at an address."""
    if host in ("", "0.0.0.0"):  # the page checks the name by which it is asked for
        raise UserError(f"--host {host} is invalid: expected the name or the IPv4 address by which others reach this machine.")
    try:
        with socket.create_server((host, number)):
            pass
    except OSError as error:
        raise UserError(
            f"--host {host} --port {number} cannot be used: {error.strerror}. Choose another --port, or a name or IPv4 address "
            "of this machine as --host."
        ) from error


if __name__ == "__main__":
    main()
