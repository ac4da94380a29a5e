"""Which saved views an experiment gets, and which stay as their user left them."""

import base64
import json
import math
import re
import time
import zlib
from dataclasses import replace
from typing import Any

import pytest
from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from mnist_exp.errors import UserError
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunInfo, RunRecord
from mnist_exp.tracking.connection import connect
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.mlflow_ui import list_pages
from mnist_exp.tracking.views import CURVES, MOST, TEMPLATES, VERSION, VIEW_PREFIX, VIEWS, fixed_views, sweep_view, view_tag


def sweep(store: MLflowStore, sweeper: str = "grid") -> RunRecord:
    """The record of a new sweep."""
    tags = {tag.SWEEP_JOBS: "2", tag.SWEEPER: sweeper, tag.KEYS: "model optimizer.lr seed", tag.GRIDS: '[["seed=0,1"]]'}
    with store.start(RunInfo("sweep", "", tags)) as tracker:
        pass
    return store.get_run(tracker.run_id)


def train(store: MLflowStore, points: int = 3, data: str = "mnist", **tags: str) -> RunRecord:
    """The record of a finished run with `points` points of each curve."""
    with store.start(RunInfo("run", "", {tag.DATA: data, tag.RECIPE: "a 1", tag.OBJECTIVE: "val/accuracy"} | tags)) as tracker:
        tracker.log_params({"model": "a", "train.optimizer.lr": 0.1, "seed": 0})
        for step in range(points):
            tracker.log_metrics({"train/loss": 1.0, "val/accuracy": 0.9 + step / 100}, step)
    return store.get_run(tracker.run_id)


@pytest.fixture
def opened(store: str) -> MLflowStore:
    result = MLflowStore(store, "test")
    result.open()
    return result


def saved(opened: MLflowStore) -> dict[str, str]:
    """The saved views of an experiment, by key."""
    tags = opened.client.get_experiment(opened.experiment_id).tags
    return {name.removeprefix(VIEW_PREFIX): value for name, value in tags.items() if name.startswith(VIEW_PREFIX)}


def state(value: str) -> dict[str, Any]:
    packed = base64.b64decode(json.loads(value)["state"].removeprefix("deflate;"))
    return json.loads(zlib.decompress(packed))


def charts(opened: MLflowStore, found: RunRecord, children: list[RunRecord]) -> list[str]:
    """The metrics and axes of the charts of a sweep."""
    opened.sweep_links(found, children)
    drawn = state(saved(opened)[f"{CURVES}-{found.run_id[:8]}"])["compareRunCharts"]
    return [chart.get("metricKey") or chart.get("xaxis", {}).get("key", "all") for chart in drawn]


def test_a_view_is_written_once_and_stays_as_someone_changed_it(opened: MLflowStore) -> None:
    first = saved(opened)
    assert {key: state(value) for key, value in first.items()} == {key: view["state"] for key, view in fixed_views().items()}
    key = f"failed-{VERSION}"
    opened.client.set_experiment_tag(opened.experiment_id, VIEW_PREFIX + key, "mine")
    connect(opened.uri, "test")
    assert saved(opened) == first | {key: "mine"}


def test_each_data_set_gets_a_leaderboard_by_the_objective_of_its_runs(opened: MLflowStore) -> None:
    train(opened)
    train(opened, data="own", **{tag.OBJECTIVE: "val/loss"})
    boards = {json.loads(text)["name"]: state(text) for key, text in saved(opened).items() if key.startswith("leaderboard")}
    by_accuracy, by_loss = boards["Leaderboard: mnist by val/accuracy"], boards["Leaderboard: own by val/loss"]
    assert (by_accuracy["orderByAsc"], by_loss["orderByAsc"]) == (False, True)
    assert "data = 'own'" in by_loss["searchFilter"]
    marks = opened.client.get_experiment(opened.experiment_id).tags
    assert marks["mlflow.experiment.primaryMetric.name"] == "val/accuracy", "that of the first run"


def test_a_damaged_view_or_value_stops_no_run(opened: MLflowStore) -> None:
    opened.client.set_experiment_tag(opened.experiment_id, f"{VIEW_PREFIX}leaderboard-damaged", "no view")
    runs = [train(opened), replace(train(opened), metrics={"val/accuracy": math.nan})]
    _, view = sweep_view(sweep(opened), runs, ["val/accuracy"])
    json.dumps(view, allow_nan=False)


def test_a_sweep_has_no_chart_of_a_single_point_and_one_for_each_key(opened: MLflowStore) -> None:
    found = sweep(opened)
    assert charts(opened, found, [train(opened, points=1)]) == ["model", "train.optimizer.lr"]
    assert charts(opened, found, [train(opened)]) == ["model", "train.optimizer.lr", "train/loss", "val/accuracy"]
    assert charts(opened, sweep(opened, "optuna"), [train(opened)]) == ["all", "model", "train.optimizer.lr"]


def test_many_runs_are_averaged_by_arm_and_the_name_says_how_many(opened: MLflowStore) -> None:
    run, found = train(opened), sweep(opened)
    few, some, many = (sweep_view(found, [run] * count, ["train/loss"])[1] for count in (20, 21, 300))
    assert "groupBy" not in few["state"]
    assert some["state"]["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    assert many["name"].endswith("the first 100 of 300 runs")


def test_only_the_newest_sweeps_keep_a_view(opened: MLflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1, 1000))
    run, sweeps = train(opened), [sweep(opened) for _ in range(MOST[CURVES] + 2)]
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    for found in sweeps:
        opened.sweep_links(found, [run])
    kept = {key for key in saved(opened) if key.startswith(CURVES)}
    assert kept == {f"{CURVES}-{found.run_id[:8]}" for found in sweeps[2:]}


def test_every_view_fits_into_a_tag(opened: MLflowStore) -> None:
    run = train(opened, data="a" * 100)
    views = [sweep_view(sweep(opened, sweeper), [run] * 300, ["train/loss"])[1] for sweeper in ("grid", "optuna")]
    assert max(map(len, [*saved(opened).values(), *map(view_tag, views)])) <= MAX_EXPERIMENT_TAG_VAL_LENGTH


def test_the_views_name_tags_that_runs_have() -> None:
    named = set(re.findall(r"tags\.`?(\w+)", json.dumps(TEMPLATES)))
    assert named <= {value for value in vars(tag).values() if isinstance(value, str)}


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_has_a_link_to_a_view_that_is_saved(view: str, opened: MLflowStore) -> None:
    if view == "leaderboard":
        with pytest.raises(UserError):
            list_pages(opened, None, view)
    train(opened)
    run_id = sweep(opened).run_id if view == CURVES else None
    first = next(iter(list_pages(opened, run_id, view).values()))
    assert re.search(r"ShareKey=([\w.-]+)", first).group(1) in saved(opened)
