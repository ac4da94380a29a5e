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
from mnist_exp.console import show_lines
from mnist_exp.errors import UserError
from mnist_exp.overrides import command
from mnist_exp.signals import install_signal_handlers
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking import views
from mnist_exp.tracking.base import RunRecord, report_name

if TYPE_CHECKING:
    from mnist_exp.tracking.mlflow_store import MLflowStore

LOOPBACK = "127.0.0.1"
MAX_LEADERBOARDS = 3  # of the data sets that runs used last


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
    line += ["--uvicorn-opts", "--log-level warning"]
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
    """Return the paths of pages by name: first the one that is asked for, by default the newest sweep with an answer.

    Raises:
        UserError: The run does not exist or is no sweep with curves, or the view has no runs.
    """
    runs, saved = store.runs(), store.client.get_experiment(store.experiment_id).tags
    boards = {}
    for data, objective in dict.fromkeys((run.data, run.objective) for run in runs if tag.RECIPE in run.tags):
        key, board = views.leaderboard(data, objective)
        if views.VIEW_PREFIX + key in saved:
            boards[board["name"]] = views.view_path(store.experiment_id, key)
    pages = dict(list(boards.items())[:MAX_LEADERBOARDS])
    pages |= {view["name"]: views.view_path(store.experiment_id, key) for key, view in views.fixed_views().items()}
    pages["Registered models"] = "/#/models?workflowType=machine_learning"
    if view == views.CURVES and run_id in (None, "latest"):
        run_id = store.find_sweep("latest").run_id
    run_id = run_id or next((run.run_id for run in runs if run.tags.get(tag.ANSWER)), None)
    if run_id is not None:
        pages = list_run_pages(store, store.find_run(run_id)) | pages
    first = next((name for name in pages if name.startswith((view or "").capitalize())), None)
    if first is None:
        expected = "the id of a sweep with it" if view == views.CURVES else "runs in the store"
        raise UserError.invalid("--view", view, expected, f"`{command('runs', 'list')}` lists them.")
    return {first: pages[first]} | pages


def list_run_pages(store: "MLflowStore", run: RunRecord) -> dict[str, str]:
    """Return the paths of the pages of a run by name: of a sweep, also its last report and its curves."""
    answer = run.tags.get(tag.ANSWER, "")
    pages = {f"Answer: {answer}" if answer else run.name: views.run_path(run.experiment_id, run.run_id)}
    if tag.SWEEP_JOBS in run.tags:
        for name, text in run.tags.items():
            factor = name.removeprefix(f"{tag.ANSWER}.")
            if factor != name and answer and text.startswith(answer):
                pages["Report"] = views.run_path(run.experiment_id, run.run_id, report_name(factor))
        if curves := store.sweep_links(run, store.children(run.run_id)).get("Curves"):
            pages["Curves"] = f"/{curves}"
    return pages


def show_links(address: str, pages: dict[str, str]) -> None:
    """Print the name and the link of each page."""
    show_lines([f"{' '.join(name.split())}: {address}{path}" for name, path in pages.items()])
