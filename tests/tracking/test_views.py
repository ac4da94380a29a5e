"""Which saved views an experiment gets, and which stay as their user left them."""

import base64
import json
import re
import time
import zlib
from typing import Any

import pytest
from mlflow.utils.validation import MAX_EXPERIMENT_TAG_VAL_LENGTH

from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.connection import connect
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.mlflow_ui import list_pages
from mnist_exp.tracking.views import CURVES, MAX_SWEEPS, TEMPLATES, VERSION, VIEW_PREFIX, VIEWS, curves_tag

SWEEP = "0123456789abcdef" * 2


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


def test_a_view_is_written_once_and_stays_as_someone_changed_it(opened: MLflowStore) -> None:
    first = saved(opened)
    assert {key: state(value) for key, value in first.items()} == {key: view["state"] for key, view in VIEWS.items()}
    key = f"leaderboard-{VERSION}"
    opened.client.set_experiment_tag(opened.experiment_id, VIEW_PREFIX + key, "mine")
    connect(opened.uri, "test")
    assert saved(opened) == first | {key: "mine"}


def test_the_view_of_a_sweep_counts_its_runs(opened: MLflowStore) -> None:
    for finished in (3, 15):  # shown while it runs, and at its end
        assert f"viewStateShareKey={CURVES}-01234567&" in opened.link_curves(SWEEP, finished, "val/accuracy")
    view = saved(opened)[f"{CURVES}-01234567"]
    assert "15 runs" in json.loads(view)["name"]
    assert SWEEP in state(view)["searchFilter"]


def test_only_the_newest_sweeps_keep_a_view(opened: MLflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    ids = [f"{number:08x}" * 4 for number in range(MAX_SWEEPS + 2)]
    for sweep_id in ids:
        opened.link_curves(sweep_id, 15, "val/accuracy")
    assert saved(opened).keys() == {*VIEWS, *(f"{CURVES}-{sweep_id[:8]}" for sweep_id in ids[2:])}


def test_the_name_says_how_many_runs_the_ui_averages() -> None:
    assert json.loads(curves_tag(SWEEP, 300, "val/accuracy"))["name"].endswith("first 100 of 300 runs")


def test_every_view_fits_into_a_tag(opened: MLflowStore) -> None:
    values = [*saved(opened).values(), curves_tag(SWEEP, 300, "val/accuracy")]
    assert max(map(len, values)) <= MAX_EXPERIMENT_TAG_VAL_LENGTH


def test_the_views_name_tags_that_runs_have() -> None:
    named = set(re.findall(r"tags\.`?(\w+)", json.dumps(TEMPLATES)))
    assert named <= {value for value in vars(tag).values() if isinstance(value, str)}


@pytest.mark.parametrize("view", TEMPLATES)
def test_each_view_has_a_link_to_a_view_that_is_saved(view: str, opened: MLflowStore) -> None:
    info = RunInfo("sweep", "", {tag.SWEEP_JOBS: "1"})
    with opened.start(info) as tracker:
        run_id = tracker.run_id
    first = next(iter(list_pages(opened, run_id if view == CURVES else None, view).values()))
    assert re.search(r"ShareKey=([\w.-]+)", first).group(1) in saved(opened)
