"""Command: start the MLflow UI and print links to its pages: python -m mnist_exp.ui [ID] [--view NAME] [--port PORT]."""

import argparse
import os
import socket
import sys

from mnist_exp.cli import reported_errors
from mnist_exp.errors import UserError
from mnist_exp.overrides import store_uri
from mnist_exp.redaction import without_credentials
from mnist_exp.tracking import views
from mnist_exp.tracking.connection import view_keys
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.tags import SWEEP_JOBS

LOOPBACK = "127.0.0.1"


def main() -> None:
    """Parse the command line, print the links, become the server; a user's mistake ends with a message and status 1."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.ui", description=__doc__)
    parser.add_argument("run_id", nargs="?", metavar="ID", help="open this run or sweep, by its id or its first 6 or more digits")
    parser.add_argument("--view", choices=(*views.VIEWS, views.CURVES), help="open this saved view; curves are those of a sweep")
    parser.add_argument("--port", type=int, default=5000, choices=range(1, 65536), metavar="PORT")
    arguments = parser.parse_args()
    if arguments.run_id and arguments.view not in (None, views.CURVES):
        parser.error(f"--view {arguments.view} shows all runs: leave out {arguments.run_id}")
    with reported_errors():
        store = MLflowStore(store_uri(), "mnist_exp")
        pages = list_pages(store, arguments.run_id, arguments.view)
        if store.uri.startswith("http"):
            show_links(without_credentials(store.uri), pages)
            return
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, arguments.port)) == 0:
                other = f"--port {arguments.port + 1}"
                sys.exit(f"--port {arguments.port} is in use, perhaps by another UI. Choose another one: {other}")
        show_links(f"http://{views.HOST}:{arguments.port}", pages)
        print(f"If your browser does not find {views.HOST}, write {LOOPBACK} instead.", flush=True)
    # Four workers and the job runner would take 12 s and 1.7 GB instead of 6 s and 0.5 GB.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    hosts = [name for host in (views.HOST, "localhost", LOOPBACK, "[[]::1]") for name in (host, f"{host}:*")]
    append("MLFLOW_SERVER_ALLOWED_HOSTS", *hosts)
    append("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", f"http://{views.HOST}:{arguments.port}")
    server = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", store.uri]
    os.execv(sys.executable, [*server, "--port", str(arguments.port)])  # in this process, so that stopping it stops the server


def append(variable: str, *values: str) -> None:
    """Add values to the comma-separated ones of an environment variable."""
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), *values]))


def list_pages(store: MLflowStore, run_id: str | None, view: str | None) -> dict[str, str]:
    """Return the paths of pages by name: first the one that is asked for, then the saved views.

    Raises:
        UserError: The run does not exist, or has no curves.
    """
    store.open()
    keys = view_keys(store.client, store.experiment_id)
    found = {views.VIEWS[name].name: views.view_path(store.experiment_id, key) for name, key in keys.items()}
    if view in views.VIEWS:
        if view not in keys:
            raise UserError(f"--view {view}: the view was deleted from experiment mnist_exp. Choose another one.")
        return {(name := views.VIEWS[view].name): found[name]} | found
    if view == views.CURVES and run_id is None:
        run_id = store.find_sweep("latest", finished_too=True)[0].run_id
    if run_id is None:
        return found or {"Runs": views.runs_path(store.experiment_id)}
    run = store.get_run(store.resolve_id(run_id))
    store.experiment_id = run.info.experiment_id
    if SWEEP_JOBS in run.data.tags:
        finished = sum(record.status == "FINISHED" for record in store.children(run.info.run_id))
        if curves := store.link_curves(run.info.run_id, finished):
            found = {"Curves by arm": f"/{curves}"} | found
    elif view == views.CURVES:
        raise UserError(f"--view {views.CURVES} needs a sweep: run {run.info.run_id} is a single run.")
    page = {run.info.run_name: views.run_path(run.info.experiment_id, run.info.run_id)}
    return found | page if view == views.CURVES else page | found


def show_links(address: str, pages: dict[str, str]) -> None:
    """Print the link to the first page, then those to all others by name."""
    first, *others = pages.items()
    print(f"{address}{first[1]}")
    for name, path in others:
        print(f"  {name}: {address}{path}", flush=True)


if __name__ == "__main__":
    main()
