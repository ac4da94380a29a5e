"""Runs as the MLflow UI shows them: addresses, and the saved view with the leaderboard."""

import base64
import json
import time
import zlib

LEADERBOARD = "leaderboard"
# MLflow has no public interface for saved views. The UI reads them from this tag; tests/commands/test_ui.py opens one.
VIEW_TAG = f"mlflow.sharedViewState.{LEADERBOARD}"
COLUMNS = (
    "metrics.`test/accuracy`",
    "metrics.`test/loss`",
    "metrics.`model/parameters`",
    "tags.`data`",
    "tags.`overrides`",
)


def leaderboard_view() -> str:
    """Return the leaderboard's view as the UI stores it."""
    state = {"selectedColumns": COLUMNS, "orderByKey": COLUMNS[0], "orderByAsc": False, "searchFilter": ""}
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = int(time.time() * 1000)
    return json.dumps({"name": "Leaderboard", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def leaderboard_path(experiment_id: str) -> str:
    """Return the path of the page that lists an experiment's runs in the leaderboard's columns."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={LEADERBOARD}"


def run_path(experiment_id: str, run_id: str) -> str:
    """Return the path of the page of a run."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
