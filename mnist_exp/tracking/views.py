"""The MLflow UI: addresses of pages, saved views, and the experiment's own page.

MLflow has no public interface for saved views. The UI reads them from tags of the experiment, whose names and state keys are not
documented. All of them are in this file, as MLflow `CHECKED_WITH` reads them; tests/commands/test_ui.py opens each in a browser.
"""

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from mnist_exp.tracking.tags import ANSWER, ARM, DATA, OVERRIDES, SWEEP, SWEEP_JOBS

CHECKED_WITH = "3.17"
VIEW_PREFIX = "mlflow.sharedViewState."
WRITTEN = "mnist_exp.view."  # and the key of a view: its digest as we wrote it
FIRST_LEADERBOARD = "3f163544af7b"  # the digest of the only view of versions that kept no digests
ONE_SWEEP = "curves-"  # and the first digits of the sweep's id: the saved view of its curves
MAX_SWEEPS = 20  # saved views of single sweeps; the oldest go
RUN_NAME, DURATION = "attributes.`Run Name`", "attributes.`Duration`"
MAX_LOADED = 100  # runs that the UI loads at first: what it averages
MARKS = {  # tags of an experiment: a typed address opens its training runs; the metric that the UI puts first
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "test/accuracy",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}
# The UI opens its Assistant over a quarter of the page at a visitor's first visit, but only on `localhost`, 127.0.0.1 and ::1.
# Neither the server nor a link can turn that off. Browsers resolve every name below .localhost to this machine (RFC 6761).
HOST = "mnist-exp.localhost"


@dataclass(frozen=True)
class View:
    """A saved view of an experiment's runs.

    Args:
        name: The name that the UI shows.
        state: The state of the page, by the UI's own keys.
    """

    name: str
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest of name and state."""
        return sha256(json.dumps([self.name, self.state], sort_keys=True).encode()).hexdigest()[:12]

    def as_tag(self) -> str:
        """Return the view as the value of the tag."""
        packed = base64.b64encode(zlib.compress(json.dumps(self.state).encode(), 9)).decode()
        now = int(time.time() * 1000)
        return json.dumps({"name": self.name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def _metric(name: str) -> str:
    return f"metrics.`{name}`"


def _tag(name: str) -> str:
    return f"tags.`{name}`"


def _table(columns: Mapping[str, int], search: str, order: str, *, ascending: bool = False) -> dict[str, Any]:
    """Return the state of a table: its columns with their widths in pixels, its filter and its order."""
    return {
        "searchFilter": search,
        "orderByKey": order,
        "orderByAsc": ascending,
        "selectedColumns": list(columns),
        "columnOrder": [RUN_NAME, *columns],
        "columnWidths": {RUN_NAME: 200, **columns},
    }


def _charts(*cards: dict[str, Any], section: str) -> dict[str, Any]:
    """Return the state of a page of charts in one section; the UI adds sections with the other metrics below."""
    charts = [
        {"uuid": f"{section}-{number}", "metricSectionId": section, "deleted": False, "isGenerated": False, **card}
        for number, card in enumerate(cards)
    ]
    shown = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False, "columns": 2}
    sections = [{"uuid": section, "name": section, **shown}]
    return {"compareRunCharts": charts, "compareRunSections": sections, "isAccordionReordered": True, "runsHiddenMode": "SHOWALL"}


def _line(metric: str) -> dict[str, Any]:
    style = {"lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": []}
    x_axis = {"xAxisKey": "step", "selectedXAxisMetricKey": "", "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return {"type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], "displayName": metric, **style, **x_axis}


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "metricKey": metric, "displayName": metric, "runsCountToCompare": MAX_LOADED}


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {axis: {"key": key, "type": "METRIC"} for axis, key in (("xaxis", x), ("yaxis", y))}
    return {"type": "SCATTER", "displayName": f"{y} against {x}", "runsCountToCompare": MAX_LOADED, **axes}


LEADERBOARD, SWEEPS, CURVES, COST = "leaderboard", "sweeps", "curves", "cost"
VIEWS = {
    LEADERBOARD: View(
        "Leaderboard",
        _table(
            {
                _metric("test/accuracy"): 110, _metric("test/loss"): 150, _metric("model/parameters"): 140, _tag(DATA): 80,
                _tag(OVERRIDES): 290,
            },
            f"tags.{SWEEP_JOBS} IS NULL", _metric("test/accuracy"),
        ),
    ),
    SWEEPS: View(
        "Sweeps",
        _table(
            {
                _metric("sweep/jobs_finished"): 140, _metric("sweep/jobs_failed"): 125,
                _metric("sweep/best_val_accuracy"): 175, DURATION: 85, _tag(ANSWER): 700,
            },
            f"tags.{SWEEP_JOBS} LIKE '%'", "attributes.start_time",
        ),
    ),
    COST: View(
        "Accuracy against cost",
        _table({_metric("test/accuracy"): 110}, f"tags.{SWEEP_JOBS} IS NULL", _metric("test/accuracy"))
        | _charts(
            _scatter("model/parameters", "test/accuracy"), _scatter("time/total_seconds", "test/accuracy"), section="cost"
        ),
    ),
}  # fmt: skip


def curves_view(sweep_id: str, finished: int) -> View:
    """Return the view of the curves of one sweep's arms, each the mean over its finished runs."""
    of = f"the first {MAX_LOADED} of {finished} runs" if finished > MAX_LOADED else f"{finished} runs"
    groups = [{"mode": "tag", "groupByData": ARM}]
    query = f"tags.{SWEEP} = '{sweep_id}' and attributes.status = 'FINISHED'"
    state = {
        **_table({_metric("val/accuracy"): 110}, query, "params.`seed`", ascending=True),
        **_charts(
            _bar("test/accuracy"), _line("train/loss"), _line("train/accuracy"), _line("val/accuracy"), section="curves by arm"
        ),
        "groupBy": {"aggregateFunction": "average", "groupByKeys": groups},
        "useGroupedValuesInCharts": True,
    }
    return View(f"Curves by arm: sweep {sweep_id[:8]}, mean of {of}", state)


def curves_key(sweep_id: str) -> str:
    """Return the key of the view of a sweep's curves."""
    return ONE_SWEEP + sweep_id[:8]


def view_tags(tags: Mapping[str, str], added: Mapping[str, View]) -> tuple[dict[str, str], list[str]]:
    """Return the tags to set, and those to delete, that bring an experiment's saved views up to date.

    A view that a user has changed or deleted stays as it is. Next to a changed one, ours is added once it is a new one. Each view
    has a tag of its own for its digest, because several sweeps may end at once.

    Args:
        tags: The tags of the experiment.
        added: Views of single sweeps to add, by key.
    """
    changes: dict[str, str] = {}
    for key, view in {**VIEWS, **added}.items():
        first = FIRST_LEADERBOARD if key == LEADERBOARD else None
        stored, written = tags.get(VIEW_PREFIX + key), tags.get(WRITTEN + key, first)
        if view.digest in (written, tags.get(f"{WRITTEN}{key}-{view.digest}")) or (stored is None and WRITTEN + key in tags):
            continue
        if stored is not None and _digest(stored) != written:  # a user's
            key = f"{key}-{view.digest}"
        changes |= {VIEW_PREFIX + key: view.as_tag(), WRITTEN + key: view.digest}
    merged = {**tags, **changes}
    ours = {name.removeprefix(WRITTEN): name for name in merged if name.startswith(WRITTEN + ONE_SWEEP)}
    age = {key: _created(merged.get(VIEW_PREFIX + key, "")) for key in ours}
    oldest = sorted(ours, key=lambda key: age[key])[: max(0, len(ours) - MAX_SWEEPS)]
    return changes, [name for key in oldest for name in (ours[key], VIEW_PREFIX + key) if name in tags]


def _created(tag: str) -> float:
    """Return when the view in a tag was created, 0 if that is not readable."""
    try:
        return float(json.loads(tag)["createdAt"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def _digest(tag: str) -> str | None:
    """Return the digest of the view in a tag, None if it is not readable."""
    try:
        value = json.loads(tag)
        packed = base64.b64decode(value["state"].removeprefix("deflate;"))
        state = json.loads(zlib.decompressobj().decompress(packed, 100_000))
        return View(value["name"], state).digest
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None


def describe_experiment(experiment_id: str) -> str:
    """Return the description of the experiment in Markdown."""
    links = "\n".join(f"- [{view.name}]({view_path(experiment_id, key)[1:]})" for key, view in VIEWS.items())
    return (
        "Training runs of mnist_exp. A run is one training of one model. A sweep is a parent run with one child per job; its "
        f"page opens with the answer of `mnist_exp.compare`.\n\n{links}\n\n"
        "The curves of a sweep, averaged by arm, are linked on the sweep's page. `test/...` is measured once, at the end; choose "
        "by `val/...`."
    )


def view_path(experiment_id: str, key: str) -> str:
    """Return the path of the page that shows a saved view."""
    mode = "&compareRunsMode=CHART" if key.startswith((CURVES, COST)) else ""  # the state does not hold it
    return f"{runs_path(experiment_id)}&viewStateShareKey={quote(key)}{mode}"


def current_key(tags: Mapping[str, str], key: str, view: View) -> str:
    """Return the key under which an experiment holds our version of a view."""
    added = f"{key}-{view.digest}"
    return added if VIEW_PREFIX + added in tags else key


def runs_path(experiment_id: str) -> str:
    """Return the path of the page that lists an experiment's runs."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def run_path(experiment_id: str, run_id: str) -> str:
    """Return the path of the page of a run."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def artifact_path(run_id: str, path: str) -> str:
    """Return the path, relative to the UI's page, at which the server hands out an artifact."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id}"


def model_name(text: str) -> str:
    """Return the name of a logged model without the characters that MLflow refuses."""
    return re.sub(r"""[/:.%"'\s]+""", "-", text).strip("-") or "model"
