"""The MLflow UI: addresses of pages, saved views, and the experiment's own page.

MLflow has no public interface for saved views. The UI reads them from tags of the experiment, whose names and state keys are not
documented. `views.json` holds them as MLflow 3.17 reads them; tests/commands/test_ui.py opens each in a browser.
"""

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from mnist_exp.paths import DISTRIBUTION, NAME

VERSION = ".".join(version(DISTRIBUTION).split(".")[:2])
VIEW_PREFIX = "mlflow.sharedViewState."
COST, CURVES = "cost", "curves"
TEMPLATES = json.loads(Path(__file__).with_name("views.json").read_text(encoding="utf-8"))
# By key. The version in it keeps what another version has written.
VIEWS: dict[str, dict[str, Any]] = {f"{name}-{VERSION}": view for name, view in TEMPLATES.items() if name != CURVES}
MAX_SWEEPS = 20  # saved views of single sweeps; with 40 views of all kinds, the UI lets users save no others
MAX_LOADED = 100  # runs that the UI loads at first: what it averages
MARKS = {  # tags of an experiment: a typed address opens its training runs; the metric that the UI puts first
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "test/accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}
# The UI opens its Assistant over a quarter of the page at a visitor's first visit, but only on `localhost`, 127.0.0.1 and ::1.
# Neither the server nor a link can turn that off. Browsers resolve every name below .localhost to this machine (RFC 6761).
HOST = f"{DISTRIBUTION}.localhost"


def view_tag(view: Mapping[str, Any]) -> str:
    """Return a view as the value of its tag."""
    packed = base64.b64encode(zlib.compress(json.dumps(view["state"]).encode(), 9)).decode()
    return json.dumps({"name": view["name"], "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"})


def curves_tag(sweep_id: str, finished: int, objective: str) -> str:
    """Return the view of the curves of a sweep's arms, each the mean over its finished runs, as the value of its tag."""
    runs = f"the first {MAX_LOADED} of {finished} runs" if finished > MAX_LOADED else f"{finished} runs"
    template = Template(json.dumps(TEMPLATES[CURVES]))
    return view_tag(json.loads(template.substitute(sweep_id=sweep_id, sweep=sweep_id[:8], runs=runs, objective=objective)))


def surplus_curves(tags: Mapping[str, str]) -> list[str]:
    """Return the names of the tags of the oldest views of single sweeps, all but the newest MAX_SWEEPS."""
    ours = {name: value for name, value in tags.items() if name.startswith(f"{VIEW_PREFIX}{CURVES}-")}
    return sorted(ours, key=lambda name: json.loads(ours[name])["createdAt"])[:-MAX_SWEEPS]


def describe_experiment(experiment_id: str) -> str:
    """Return the description of the experiment in Markdown."""
    links = "\n".join(f"- [{view['name']}]({view_path(experiment_id, key)[1:]})" for key, view in VIEWS.items())
    return (
        f"Training runs of {NAME}. A run is one training of one model. A sweep is a parent run with one child per job; its "
        f"page opens with the answer of `{NAME}.compare`.\n\n{links}\n\n"
        "The curves of a sweep, averaged by arm, are linked on the sweep's page. `test/...` is measured once, at the end; choose "
        "by `val/...`."
    )


def view_path(experiment_id: str, key: str) -> str:
    """Return the path of the page that shows a saved view."""
    mode = "&compareRunsMode=CHART" if key.startswith((CURVES, COST)) else ""  # the state does not hold it
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={quote(key)}{mode}"


def run_path(experiment_id: str, run_id: str) -> str:
    """Return the path of the page of a run."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def artifact_path(run_id: str, path: str) -> str:
    """Return the path, relative to the UI's page, at which the server hands out an artifact."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id}"


def model_name(text: str) -> str:
    """Return the name of a logged model without the characters that MLflow refuses."""
    return re.sub(r"""[/:.%"'\s]+""", "-", text).strip("-") or "model"
