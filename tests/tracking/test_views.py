"""Which saved views an experiment gets, and what stays as its user left it."""

import json
import time

import mlflow
import pytest

from mnist_exp.tracking.tags import ANSWER
from mnist_exp.tracking.views import (
    CHECKED_WITH,
    LEADERBOARD,
    MAX_SWEEPS,
    VIEW_PREFIX,
    VIEWS,
    WRITTEN,
    View,
    current_key,
    curves_key,
    curves_view,
    view_tags,
)

KEY = VIEW_PREFIX + LEADERBOARD


@pytest.fixture
def tags() -> dict[str, str]:
    """The tags of an experiment with our views."""
    return view_tags({}, {})[0]


def test_mlflow_is_the_version_whose_pages_were_looked_at() -> None:
    assert mlflow.__version__.startswith(f"{CHECKED_WITH}."), "run tests/commands/test_ui.py, look at the pages, set CHECKED_WITH"


def test_every_view_fits_into_a_tag_and_is_written_once(tags: dict[str, str]) -> None:
    assert tags.keys() == {prefix + key for prefix in (VIEW_PREFIX, WRITTEN) for key in VIEWS}
    assert max(map(len, tags.values())) <= 5000
    assert view_tags(tags, {}) == ({}, [])


def test_an_outdated_view_is_replaced(tags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    new = View("Leaderboard", {"searchFilter": "changed"})
    monkeypatch.setitem(VIEWS, LEADERBOARD, new)
    changes, _ = view_tags(tags, {})
    assert changes.keys() == {KEY, WRITTEN + LEADERBOARD}
    assert current_key(tags | changes, LEADERBOARD, new) == LEADERBOARD
    assert view_tags(tags | changes, {}) == ({}, [])


def test_a_view_that_a_user_changed_stays_and_ours_is_added_next_to_it(
    tags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tags | {KEY: View("Mine", {"searchFilter": ""}).as_tag()}
    assert view_tags(changed, {}) == ({}, []), "ours has not changed: nothing to add"
    new = View("Leaderboard", {"searchFilter": "changed"})
    monkeypatch.setitem(VIEWS, LEADERBOARD, new)
    changes, _ = view_tags(changed, {})
    assert KEY not in changes
    assert current_key(changed | changes, LEADERBOARD, new) == f"{LEADERBOARD}-{new.digest}"
    assert view_tags(changed | changes, {}) == ({}, [])


def test_a_view_that_a_user_deleted_is_not_restored(tags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    del tags[KEY]
    assert view_tags(tags, {}) == ({}, [])
    monkeypatch.setitem(VIEWS, LEADERBOARD, View("Leaderboard", {"searchFilter": "changed"}))
    assert view_tags(tags, {}) == ({}, []), "nor when ours has changed"


@pytest.mark.parametrize("value", ["", "[]", "{", '{"name": 1}', json.dumps({"name": "x", "state": "deflate;AAAA"})])
def test_a_damaged_view_stays_and_ours_is_added(value: str, tags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIEWS, LEADERBOARD, View("Leaderboard", {"searchFilter": "changed"}))
    changes, _ = view_tags(tags | {KEY: value}, {})
    assert len(changes) == 2
    assert KEY not in changes


def test_the_first_view_of_earlier_versions_is_ours() -> None:
    columns = ["test/accuracy", "test/loss", "model/parameters"]
    selected = [*(f"metrics.`{name}`" for name in columns), "tags.`data`", "tags.`overrides`"]
    state = {"selectedColumns": selected, "orderByKey": selected[0], "orderByAsc": False, "searchFilter": ""}
    changes, _ = view_tags({KEY: View("Leaderboard", state).as_tag()}, {})
    assert KEY in changes


def test_only_the_newest_sweeps_keep_a_view(tags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"{number:08x}" * 4 for number in range(MAX_SWEEPS + 2)]
    times = iter(range(1, 1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    for sweep_id in ids:
        changes, surplus = view_tags(tags, {curves_key(sweep_id): curves_view(sweep_id, 15)})
        tags = {key: value for key, value in (tags | changes).items() if key not in surplus}
    kept = [key for key in tags if key.startswith(VIEW_PREFIX + "curves-")]
    assert kept == [VIEW_PREFIX + curves_key(sweep_id) for sweep_id in ids[2:]]
    assert len([key for key in tags if key.startswith(VIEW_PREFIX)]) <= 40


def test_the_name_says_how_many_runs_the_ui_averages() -> None:
    assert curves_view("a" * 32, 15).name == "Curves by arm: sweep aaaaaaaa, mean of 15 runs"
    assert curves_view("a" * 32, 300).name == "Curves by arm: sweep aaaaaaaa, mean of the first 100 of 300 runs"


def test_the_answer_is_a_column_of_the_sweeps() -> None:
    assert f"tags.`{ANSWER}`" in VIEWS["sweeps"].state["selectedColumns"]
