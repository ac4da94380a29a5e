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
from mnist_exp.tracking.mlflow_store import MLflowStore


def stored(store: str) -> tuple[str, dict[str, object], list[str]]:
    """The id, the definition and the arms of the children of the only sweep."""
    opened = MLflowStore(store, "mnist_exp")
    parent, _ = opened.find_sweep("latest", finished_too=True)
    text = Path(MlflowClient(store).download_artifacts(parent.run_id, "sweep.json")).read_text()
    children = sorted(opened.children(parent.run_id), key=lambda child: child.job or 0)
    assert [child.status for child in children] == ["FINISHED"] * len(children)
    assert parent.status == "FINISHED"
    return parent.run_id, json.loads(text), [child.tags["arm"] for child in children]


@pytest.mark.slow
def test_seeds_and_then_an_arm_are_added(command_line: CommandLine, call: Call, store: str) -> None:
    assert command_line(*SHORT, "model=se_cnn,plain_cnn", "seed=0,1").returncode == 0
    _, before, _ = stored(store)
    done = command_line("-m", "sweep.extend=latest", "seed=range(0,3)")
    assert done.returncode == 0, done.stderr
    _, definition, arms = stored(store)
    assert arms == ["se_cnn", "se_cnn", "plain_cnn", "plain_cnn", "se_cnn", "plain_cnn"], "existing jobs are skipped"
    assert definition["jobs"][:4] == before["jobs"]
    assert definition["extensions"][0]["overrides"] == ["seed=range(0,3)"]
    done = command_line("-m", "sweep.extend=latest", "model=plain_cnn_matched")
    assert done.returncode == 0, done.stderr
    sweep, definition, arms = stored(store)
    assert arms[6:] == ["plain_cnn_matched"] * 3, "with every existing seed"
    parent = MlflowClient(store).get_run(sweep)
    assert parent.data.tags["sweep_jobs"] == "9"
    note = parent.data.tags["mlflow.note.content"]
    assert all(f"`{override}`" in note for override in ("seed=range(0,3)", "model=plain_cnn_matched"))
    for refused in (["data=mnist", "seed=0"], ["seed=0,2"]):  # other data, and no new job
        done = command_line("-m", "sweep.extend=latest", *refused)
        assert done.returncode == 1
        assert refused[0] in done.stderr
    done = call(compare.main, "--baseline", "plain_cnn")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 seeds" in " ".join(done.stdout.split()), "was added later, which needs the wider interval"


@pytest.mark.slow
def test_a_killed_extension_is_resumed_and_other_software_is_refused(
    command_line: CommandLine, store: str, tmp_path: Path
) -> None:
    assert command_line(*SHORT, "seed=3,4").returncode == 0
    overrides = ["sweep.extend=latest", "seed=range(5,20)", f"output_dir={tmp_path}/outputs"]
    extend = [sys.executable, "-m", "mnist_exp.run", "-m", *overrides]
    with subprocess.Popen(extend, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        opened, deadline = MLflowStore(store, "mnist_exp"), time.monotonic() + 120
        sweep = opened.find_sweep("latest", finished_too=True)[0].run_id
        while len(opened.children(sweep)) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    done = command_line("-m", "sweep.resume=latest")
    assert done.returncode == 0, done.stderr
    _, definition, arms = stored(store)
    assert len(arms) == 17
    assert [step["count"] for step in definition["extensions"]] == [15]

    file = Path(MlflowClient(store).get_run(sweep).info.artifact_uri.removeprefix("file://")) / "sweep.json"
    file.write_text(json.dumps(definition | {"software": {"code": "other", "torch": "2.0"}}))
    done = command_line("-m", "sweep.extend=latest", "seed=90")
    assert done.returncode == 1
    assert "sweep.force=true" in done.stderr
    assert "Traceback" not in done.stderr
