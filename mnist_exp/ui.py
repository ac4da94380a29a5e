"""Command: start the MLflow UI, and print the link to the leaderboard or a run: python -m mnist_exp.ui [RUN_ID] [--port PORT]."""

import argparse
import os
import socket
import sys

from mnist_exp.cli import reported_errors
from mnist_exp.overrides import store_uri
from mnist_exp.redaction import without_credentials
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.views import leaderboard_path, run_path


def main() -> None:
    """Parse the command line, print the link, become the server; a user's mistake ends with a message and status 1."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.ui", description=__doc__)
    parser.add_argument("run_id", nargs="?", help="open this run, by its id or the first 6 or more digits of it")
    parser.add_argument("--port", type=int, default=5000, choices=range(1, 65536), metavar="PORT")
    arguments = parser.parse_args()
    with reported_errors():
        store = MLflowStore(store_uri(), "mnist_exp")
        path = page_path(store, arguments.run_id)
        if store.uri.startswith("http"):
            print(f"{without_credentials(store.uri)}{path}")
            return
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", arguments.port)) == 0:
                other = f"--port {arguments.port + 1}"
                sys.exit(f"--port {arguments.port} is in use, perhaps by another UI. Choose another one: {other}")
        print(f"http://127.0.0.1:{arguments.port}{path}", flush=True)
    # Four workers and the job runner would take 12 s and 1.7 GB instead of 6 s and 0.5 GB.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    server = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", store.uri]
    os.execv(sys.executable, [*server, "--port", str(arguments.port)])  # in this process, so that stopping it stops the server


def page_path(store: MLflowStore, run_id: str | None) -> str:
    """Return the path of the page of a run, or of the leaderboard; raises UserError if the run does not exist."""
    store.open()
    if run_id is None:
        return leaderboard_path(store.experiment_id)
    run = store.get_run(store.resolve_id(run_id))
    return run_path(run.info.experiment_id, run.info.run_id)


if __name__ == "__main__":
    main()
