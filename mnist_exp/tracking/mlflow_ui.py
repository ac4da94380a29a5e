"""Serves the MLflow UI, and prints links to its pages."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING

from mnist_exp.cli import listen
from mnist_exp.errors import UserError
from mnist_exp.signals import install_signal_handlers
from mnist_exp.tracking import views
from mnist_exp.tracking.tags import SWEEP_JOBS

if TYPE_CHECKING:
    from mnist_exp.tracking.mlflow_store import MLflowStore

LOOPBACK = "127.0.0.1"


def show(store: "MLflowStore", run_id: str | None, view: str | None, port: int) -> None:
    """Print the links, and serve the UI until it is stopped, unless a server answers already."""
    if run_id and view not in (None, views.CURVES):
        raise UserError.invalid("--view", view, f"curves with a run or a sweep, because {view} shows all runs")
    store.open()
    pages = list_pages(store, run_id, view)
    address = f"http://{views.HOST}:{port}"
    if store.uri.startswith("http"):
        show_links(store.uri, pages)
    elif serves(store, port):
        show_links(address, pages)
    else:
        listen(port).close()  # before a server is started in vain
        serve(store, port, pages)


def serves(store: "MLflowStore", port: int) -> bool:
    """Return whether an MLflow server with the same store answers at a port of this machine."""
    query = f"http://{LOOPBACK}:{port}/api/2.0/mlflow/experiments/get?experiment_id={store.experiment_id}"
    with suppress(OSError, ValueError, KeyError, OverflowError):  # nothing answers, something else, or there is no such port
        with urllib.request.urlopen(query, timeout=10) as answer:
            found = json.load(answer)["experiment"]
        known = store.client.get_experiment(store.experiment_id)
        return bool((found["name"], found["creation_time"]) == (known.name, known.creation_time))
    return False


def serve(store: "MLflowStore", port: int, pages: dict[str, str]) -> None:
    """Run the server, print the links once it answers, and end with it."""
    hosts = [name for host in (views.HOST, "localhost", LOOPBACK, "[[]::1]") for name in (host, f"{host}:*")]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # with four workers it would take 12 s and 1.7 GB, not 6 s and 0.5 GB
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(filter(None, [os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS"), *hosts])),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(
            filter(None, [os.environ.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"), f"http://{views.HOST}:{port}"])
        ),
    }
    line = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", store.uri, "--port", str(port)]
    server = subprocess.Popen(line, env=environment, stdout=sys.stderr)  # the links alone are on stdout
    install_signal_handlers()
    try:
        while server.poll() is None:
            if serves(store, port):
                show_links(f"http://{views.HOST}:{port}", pages)
                print(
                    f"If your browser does not find {views.HOST}, write {LOOPBACK} instead. Stop the server with Ctrl-C.",
                    flush=True,
                )
                break
            time.sleep(0.2)
        sys.exit(server.wait())
    finally:
        server.terminate()
        server.wait()


def list_pages(store: "MLflowStore", run_id: str | None, view: str | None) -> dict[str, str]:
    """Return the paths of pages by name: first the one that is asked for, then the saved views.

    Raises:
        UserError: The run does not exist, or has no curves.
    """
    saved = {shown["name"]: views.view_path(store.experiment_id, key) for key, shown in views.VIEWS.items()}
    if view not in (None, views.CURVES):
        name = views.TEMPLATES[view]["name"]
        return {name: saved[name]} | saved
    if view == views.CURVES and run_id in (None, "latest"):
        run_id = store.find_sweep("latest").run_id
    if run_id is None:
        return saved
    run = store.find_run(run_id)
    store.experiment_id = run.experiment_id
    if SWEEP_JOBS in run.tags:
        finished = sum(record.status == "FINISHED" for record in store.children(run.run_id))
        if curves := store.link_curves(run.run_id, finished, run.objective):
            saved = {"Curves by arm": f"/{curves}"} | saved
    elif view == views.CURVES:
        raise UserError.invalid("--view", view, f"a sweep with it: run {run.run_id} is a single run")
    page = {run.name: views.run_path(run.experiment_id, run.run_id)}
    return saved | page if view == views.CURVES else page | saved


def show_links(address: str, pages: dict[str, str]) -> None:
    """Print the link to the first page, then those to all others by name."""
    first, *others = pages.items()
    print(f"{address}{first[1]}")
    for name, path in others:
        print(f"  {name}: {address}{path}", flush=True)
