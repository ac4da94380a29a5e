"""Plans of sweeps, and jobs that are added to a sweep later."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CommandLine
from mlflow import MlflowClient

from mnist_exp.tracking.definition import Definition, Extension, Job
from mnist_exp.tracking.mlflow_store import MLflowStore

SHORT = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.factor=optimizer"], "plan.factor=optimizer is invalid: expected a key that the sweep varies: model"),
        (["plan.baseline=resnet"], "plan.baseline=resnet is invalid: expected a value of plan.factor: se_cnn, plain_cnn"),
        (["plan.metric=f1"], "plan.metric=f1 is invalid: expected a metric of a run, such as test/accuracy or val/loss"),
        (["plan.margin=-1"], "plan.margin=-1 is invalid: expected a number > 0, in the displayed unit of the metric, or null"),
        (["plan.seeds=1"], "plan.seeds=1 is invalid: expected an integer >= 2, or null"),
        (["sweep.extend=zz"], "sweep.extend=zz is invalid: expected the id of a sweep"),
        (["sweep.extend=latest", "sweep.resume=latest"], "sweep.resume and sweep.extend exclude each other"),
        (["sweep.extend=latest", "plan.seeds=9"], "plan.seeds=9 is invalid: the plan of a sweep is stored before its first job"),
        (["plan.seeds=5,10"], "plan.seeds=5,10 is invalid: expected one value, because a sweep has one plan"),
        (["plan.metric=model/loss"], "plan.metric=model/loss is invalid: expected a metric of a run"),
        (
            ["++optimizer.lr=0.1,0.2"],
            "The command line contains the override '++optimizer.lr=0.1,0.2', which adds to the configuration",
        ),
    ],
)
def test_a_mistake_is_one_message_before_anything_starts(
    in_process: CommandLine, store: str, overrides: list[str], message: str
) -> None:
    done = in_process(*SHORT, "model=se_cnn,plain_cnn", "seed=0,1", *overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not MlflowClient(store).search_experiments(filter_string="name = 'mnist_exp'")


def test_a_plan_without_a_sweep_is_refused(in_process: CommandLine, store: str) -> None:
    assert "plan.seeds=5 needs a sweep, whose comparison it plans: add -m before it" in in_process("plan.seeds=5").stderr


def test_the_initial_jobs_are_those_before_the_first_extension() -> None:
    jobs = [Job(number, [], "") for number in range(5)]
    steps = [Extension("2026-01-01T00:00:00+00:00", ["seed=3"], 3, 1), Extension("2026-01-02T00:00:00+00:00", ["seed=4"], 4, 1)]
    assert Definition("GridSweeper", 5, [], {}, jobs, None, steps).initial == {0, 1, 2}
    assert Definition("GridSweeper", 5, [], {}, jobs).initial == {0, 1, 2, 3, 4}


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
def test_seeds_and_then_an_arm_are_added(command_line: CommandLine, store: str) -> None:
    plan = ("plan.baseline=plain_cnn", "plan.metric=test/accuracy", "plan.margin=0.5", "plan.seeds=3")
    assert command_line(*SHORT, "model=se_cnn,plain_cnn", "seed=0,1", *plan).returncode == 0
    _, before, _ = stored(store)
    assert before["plan"] == {
        "factor": "model", "baseline": "plain_cnn", "metric": "test/accuracy", "margin": 0.5, "seeds": 3,
    }  # fmt: skip
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
    assert "`seed=range(0,3)` added 2 jobs" in note
    assert "`model=plain_cnn_matched` added 3 jobs" in note
    done = command_line("-m", "sweep.extend=latest", "data=mnist", "seed=0")
    assert "does not vary the data, and runs on other data cannot be compared" in done.stderr
    done = command_line("-m", "sweep.extend=latest", "seed=0,2")
    assert "adds no job: all combinations with seed=0,2 are in the sweep" in done.stderr
    compared = subprocess.run(
        [sys.executable, "-m", "mnist_exp.compare"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=True,
    )
    assert "As planned: the plan was stored before the first job." in compared.stdout
    assert "1 of 3 seeds were added after the first job had started, up to the number that the plan names" in compared.stdout


@pytest.mark.slow
def test_a_killed_extension_is_resumed_and_other_software_is_refused(
    command_line: CommandLine, store: str, tmp_path: Path
) -> None:
    assert command_line(*SHORT, "seed=3,4").returncode == 0
    extend = [
        sys.executable,
        "-m",
        "mnist_exp.run",
        "-m",
        "sweep.extend=latest",
        "seed=range(5,20)",
        f"output_dir={tmp_path}/outputs",
    ]
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
    assert "sweep.extend: the sweep differs from its start: code was other" in done.stderr
    assert "Traceback" not in done.stderr
