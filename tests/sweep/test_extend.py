"""Jobs that are added to a sweep later."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Call, CommandLine
from mlflow import MlflowClient
from test_sweep import SHORT

from mnist_exp import compare
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.mlflow_store import MLflowStore


def finished(store: str) -> tuple[str, list[RunRecord]]:
    """The id and the jobs, in order, of the only sweep."""
    opened = MLflowStore(store, "mnist_exp")
    sweep = opened.find_sweep("latest")
    children = [child for child in opened.children(sweep.run_id) if child.job is not None]
    children.sort(key=lambda child: child.job or 0)
    assert [child.job for child in children] == list(range(sweep.total))
    assert [child.status for child in children] == ["FINISHED"] * len(children)
    assert sweep.status == "FINISHED"
    return sweep.run_id, children


@pytest.mark.slow
def test_seeds_and_then_an_arm_are_added(command_line: CommandLine, call: Call, store: str) -> None:
    assert command_line(*SHORT, "model=se_cnn,plain_cnn", "seed=0,1").returncode == 0
    _, before = finished(store)
    done = command_line("-m", "sweep.extend=latest", "seed=range(0,3)")
    assert done.returncode == 0, done.stderr
    _, children = finished(store)
    assert children[:4] == before, "existing jobs are skipped"
    assert [child.tags["arm"] for child in children[4:]] == ["se_cnn", "plain_cnn"]
    done = command_line("-m", "sweep.extend=latest", "model=plain_cnn_matched")
    assert done.returncode == 0, done.stderr
    sweep, children = finished(store)
    assert [child.tags["arm"] for child in children[6:]] == ["plain_cnn_matched"] * 3, "with every existing seed"
    note = MlflowClient(store).get_run(sweep).data.tags["mlflow.note.content"]
    assert all(f"{override}`" in note for override in ("'seed=range(0,3)'", "model=plain_cnn_matched 'seed=range(0,3)'"))
    done = command_line("-m", "sweep.extend=latest", "seed=0,2")
    assert done.returncode == 1, "no new job"
    assert sweep in done.stderr
    done = call(compare.main, "--baseline", "plain_cnn")
    assert done.returncode == 0, done.stderr
    assert "2 rows and 4 looks" in done.stdout, "the new arm repeats both grids"


@pytest.mark.slow
def test_a_killed_extension_is_resumed(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    assert command_line(*SHORT, "seed=3,4").returncode == 0
    overrides = ["sweep.extend=latest", "seed=range(5,20)", f"output_dir={tmp_path}/outputs"]
    extend = [sys.executable, "-m", "mnist_exp.run", "-m", *overrides]
    with subprocess.Popen(extend, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        opened, deadline = MLflowStore(store, "mnist_exp"), time.monotonic() + 120
        sweep = opened.find_sweep("latest").run_id
        while len(opened.children(sweep)) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    done = command_line("-m", "sweep.resume=latest")
    assert done.returncode == 0, done.stderr
    _, children = finished(store)
    assert len(children) == 17


@pytest.mark.slow
def test_a_changed_job_runs_by_force_and_its_former_run_is_kept_apart(command_line: CommandLine, call: Call, store: str) -> None:
    assert command_line(*SHORT, "model=se_cnn,plain_cnn", "seed=0,1").returncode == 0
    _, before = finished(store)
    client, changed = MlflowClient(store), before[1]
    recipe = json.loads(Path(client.download_artifacts(changed.run_id, "recipe.json")).read_text())
    recipe["config"]["phases"]["finetune"]["batch_size"] = 64
    client.log_text(changed.run_id, json.dumps(recipe), "recipe.json")
    assert command_line("-m", f"sweep.resume={before[0].tags['sweep_id']}").returncode == 1
    done = command_line("-m", f"sweep.resume={before[0].tags['sweep_id']}", "sweep.force=true")
    assert done.returncode == 0, done.stderr
    _, after = finished(store)
    assert [child.run_id for child in after if child.job != 1] == [child.run_id for child in before if child.job != 1]
    assert client.get_run(changed.run_id).data.tags["job_num"] == "none"
    done = call(compare.main, "--baseline", "plain_cnn")
    assert done.returncode == 0, done.stderr
    assert changed.run_id not in done.stdout
