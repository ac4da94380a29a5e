"""Entry point: start the MLflow UI on our runs, lean, and print the link: python -m mnist_exp.ui [RUN_ID] [--port PORT]."""

import argparse
import os
import socket
import sys

from mnist_exp.command_line import safe_output
from mnist_exp.errors import UserError
from mnist_exp.overrides import default_store
from mnist_exp.redaction import without_credentials
from mnist_exp.tracking import absolute_uri, leaderboard_path, open_store, run_path


def main() -> None:
    """Parse the command line, print the link, become the server; a user's mistake ends with a message and status 1."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.ui", description=__doc__)
    parser.add_argument("run_id", nargs="?", help="open on this run instead of the leaderboard")
    parser.add_argument("--port", type=int, default=5000, choices=range(1, 65536), metavar="PORT")
    arguments = parser.parse_args()
    with safe_output():
        try:
            uri = absolute_uri(os.environ.get("MLFLOW_TRACKING_URI", default_store()))
            client, experiment_id = open_store(uri, "mnist_exp")
            path = run_path(client, arguments.run_id) if arguments.run_id else leaderboard_path(experiment_id)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        if uri.startswith("http"):
            print(f"{without_credentials(uri)}{path}")
            return
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", arguments.port)) == 0:
                other = f"--port {arguments.port + 1}"
                sys.exit(f"--port {arguments.port} is taken, perhaps by a UI that runs already. Use another: {other}")
        print(f"http://127.0.0.1:{arguments.port}{path}", flush=True)
    # Four workers and the job runner would take 12 s and 1.7 GB instead of 6 s and 0.5 GB.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    serve = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", uri, "--port", str(arguments.port)]
    os.execv(sys.executable, serve)  # in this process, so that whoever stops it stops the server


if __name__ == "__main__":
    main()
