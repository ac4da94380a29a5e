"""The MLflow UI: addresses of pages, saved views, and the experiment's own page.

MLflow has no public interface for saved views. The UI reads them from tags of the experiment, whose names and state keys are not
documented. `views.json` holds templates, which `fill` completes as MLflow 3.17 reads them. tests/commands/test_ui.py opens each
in a browser.
"""

import base64
import json
import math
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from mnist_exp.metrics import metric_of, on_test
from mnist_exp.paths import DISTRIBUTION, NAME
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord

VERSION = ".".join(version(DISTRIBUTION).split(".")[:2])
VIEW_PREFIX = "mlflow.sharedViewState."
VIEWS = LEADERBOARD, SWEEPS, FAILED, CURVES = "leaderboard", "sweeps", "failed", "curves"
SEARCH = "search"  # in place of curves, of a search
TEMPLATES = json.loads(Path(__file__).with_name("views.json").read_text(encoding="utf-8"))
MOST = {LEADERBOARD: 12, CURVES: 20}  # saved views of data sets and of sweeps; with 40 of all kinds, users can save no others
MAX_LINES = 20  # runs that a chart shows one by one; more are averaged by arm
MAX_LOADED = 100  # runs that the UI loads at first: those that it averages
# The UI opens its Assistant over a quarter of the page at a visitor's first visit, but only on `localhost`, 127.0.0.1 and ::1.
# Neither the server nor a link can turn that off. Browsers resolve every name below .localhost to this machine (RFC 6761).
HOST = f"{DISTRIBUTION}.localhost"
PORT = 5000  # of the UI on this machine, unless the user names another

View = dict[str, Any]


def marks(objective: str) -> dict[str, str]:
    """Return the tags of an experiment by which a typed address opens its training runs, and the UI ranks by the objective."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": objective,
        "mlflow.experiment.primaryMetric.greaterIsBetter": str(metric_of(objective).higher_is_better is not False),
    }


def fixed_views() -> dict[str, View]:
    """Return the views that every experiment has, by key. The version in it keeps what another version has written."""
    return {f"{name}-{VERSION}": fill(name) for name in (SWEEPS, FAILED)}


def leaderboard(data: str, objective: str) -> tuple[str, View]:
    """Return the key and the view of the runs on a data set: a row per recipe, the best mean first."""
    key = re.sub(r"[^-.\w]", "_", f"{LEADERBOARD}-{data}-{objective}-{VERSION}")
    ascending = metric_of(objective).higher_is_better is False
    return key, fill(LEADERBOARD, data=data.replace("'", "_"), objective=objective, test=on_test(objective), ascending=ascending)


def sweep_view(sweep: RunRecord, children: Sequence[RunRecord], curved: Sequence[str]) -> tuple[str, View]:
    """Return the key and the view of the runs of a sweep: their curves by arm, or of a search, the objective by parameters.

    Args:
        sweep: The parent.
        children: The runs.
        curved: The metrics that have several points in each run.
    """
    objective = sweep.objective
    params = {key for child in children for key in child.params}
    swept = [key.removeprefix("phases.") for key in sweep.tags.get(tag.KEYS, "").split() if key != "seed"]
    keys = [name for key in swept for name in (key, f"train.{key}") if name in params]  # optimizer.lr is train.optimizer.lr
    is_search = sweep.tags.get(tag.SWEEPER) != "grid"
    score = on_test(objective) if any(on_test(objective) in child.metrics for child in children) else objective
    ids = {"sweep_id": sweep.run_id, "sweep": sweep.run_id[:8]}
    ascending = metric_of(objective).higher_is_better is False
    view = fill(SEARCH if is_search else CURVES, keys, **ids, objective=objective, score=score, ascending=ascending)
    state = view["state"]
    state["compareRunCharts"] = [chart for chart in state["compareRunCharts"] if chart.get("metricKey", "") in ("", *curved)]
    values = [value for child in children if math.isfinite(value := child.metrics.get(objective, math.nan))]
    if len(set(values)) > 1:  # beside the start of training, the differences at its end would be invisible
        low, high = min(values), max(values)
        worse, better = 2 * (high - low), (high - low) / 4
        below, above = (better, worse) if ascending else (worse, better)
        for chart in state["compareRunCharts"]:
            if chart.get("metricKey") == objective:
                chart["range"] = {"yMin": low - below, "yMax": high + above}
    if len(children) > MAX_LINES and not is_search:
        by_arm = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]}
        state |= {"groupBy": by_arm, "useGroupedValuesInCharts": True}
        # Groups have no parameters.
        state["compareRunCharts"] = [chart for chart in state["compareRunCharts"] if chart["type"] == "LINE"]
        count = f"the first {MAX_LOADED} of {len(children)}" if len(children) > MAX_LOADED else f"{len(children)}"
        view["name"] += f", mean of {count} runs"
    return f"{CURVES}-{sweep.run_id[:8]}", view


def fill(name: str, keys: Sequence[str] = (), **values: Any) -> View:
    """Return a view of `views.json` as MLflow reads it.

    Args:
        name: The name of the template.
        keys: The values of `$key`: a chart with it is repeated for each of them.
        values: The values of all other placeholders.
    """
    template = TEMPLATES[name]
    columns = _filled(template["columns"], values)
    charts = [
        _filled(chart, values | {"key": key, "keys": list(keys)})
        for chart in template.get("charts", [])
        for key in (keys if "$key" in chart["displayName"] else [""])
    ]
    state = _filled(template["state"], values) | {
        "selectedColumns": list(columns)[1:],
        "columnOrder": list(columns),
        "columnWidths": columns,
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,
        "compareRunSections": [{"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 2}],
        "compareRunCharts": [
            {"uuid": f"{name}-{number}", "metricSectionId": name, "isGenerated": False, "runsCountToCompare": MAX_LOADED, **chart}
            for number, chart in enumerate(charts)
        ],
    }
    return {"name": _filled(template["name"], values), "state": state}


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """Return a part of a template with its placeholders replaced; one that stands alone may have any value."""
    if isinstance(node, dict):
        return {_filled(key, values): _filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values) for value in node]
    if isinstance(node, str):
        return values[node[1:]] if node[1:] in values and node[0] == "$" else Template(node).substitute(values)
    return node


def view_tag(view: View) -> str:
    """Return a view as the value of its tag."""
    packed = base64.b64encode(zlib.compress(json.dumps(view["state"]).encode(), 9)).decode()
    return json.dumps({"name": view["name"], "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"})


def surplus_views(tags: Mapping[str, str]) -> list[str]:
    """Return the names of the tags of the oldest views of data sets and of sweeps, all but the newest MOST of each."""
    surplus = []
    for kind, most in MOST.items():
        ours = [name for name in tags if name.startswith(f"{VIEW_PREFIX}{kind}-")]
        surplus += sorted(ours, key=lambda name: _created(tags[name]))[:-most]
    return surplus


def _created(text: str) -> int:
    """Return when a view was saved, in milliseconds since 1970; 0 if its tag cannot be read."""
    found = re.search(r'"createdAt": ?(\d{1,15})', text)
    return int(found[1]) if found else 0


def link_line(links: Mapping[str, str]) -> str:
    """Return links by their text as a line of a description."""
    return " · ".join(f"[{text}]({link})" for text, link in links.items())


def describe_experiment() -> str:
    """Return the description of the experiment in Markdown."""
    return (
        f"Training runs of {NAME}. A run is one training of one model. A sweep is a parent run with one child per job; its "
        f"page opens with the answer of `{NAME}.compare`.\n\n"
        "The menu at the top right has the views: a leaderboard for each data set, the sweeps, failed runs, and the curves of "
        "each sweep. `test/...` is measured once, at the end; choose by `val/...`."
    )


def view_path(experiment_id: str, key: str, *, charts: bool = False) -> str:
    """Return the path of the page that shows a saved view as a table, or as charts."""
    mode = "&compareRunsMode=CHART" if charts else ""  # the state does not hold it
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={quote(key)}{mode}"


def run_path(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Return the path of the page of a run, or of one of its artifacts."""
    page = f"/artifacts/{quote(artifact)}" if artifact else ""
    return f"/#/experiments/{experiment_id}/runs/{run_id}{page}?workflowType=machine_learning"


def difference_path(experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the path of the page that compares runs of an experiment."""
    runs, experiments = (quote(json.dumps(ids)) for ids in (list(run_ids), [experiment_id]))
    return f"/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"


def artifact_path(run_id: str, path: str) -> str:
    """Return the path, relative to the UI's page, at which the server hands out an artifact."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id}"


def model_name(text: str) -> str:
    """Return the name of a logged model without the characters that MLflow refuses."""
    return re.sub(r"""[/:.%"'\s]+""", "-", text).strip("-") or "model"
