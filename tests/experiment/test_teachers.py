from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CommandLine, Compose, finished

from mnist_exp.errors import UserError
from mnist_exp.experiment.teachers import ensemble
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.distillation import Targets
from mnist_exp.nodes import build
from mnist_exp.storage import checkpoint
from mnist_exp.tracking.models import WEIGHTS


def test_the_targets_are_the_mean_predictions_of_the_runs(composed: Compose, digits: Dataset, tmp_path: Path) -> None:
    images, labels = digits.splits["test"].images[:5], digits.splits["test"].labels[:5]
    runs = [finished(composed("data=digits", f"model={model}"), digits, tmp_path) for model in ("se_cnn", "plain_cnn")]
    predictions = []
    for run in runs:
        saved = checkpoint.load(tmp_path / run / "checkpoint.pt")
        network = build(saved.recipe.settings.model, "model", **saved.recipe.settings.data_description.shape).eval()
        network.load_state_dict(saved.state["model"])
        predictions.append(network(images).softmax(1))
    targets = ensemble(digits, tmp_path, runs)(images, labels)
    torch.testing.assert_close(targets, (predictions[0] + predictions[1]) / 2)
    assert not targets.requires_grad
    assert Targets()(images, labels) is labels, "without a teacher"
    assert not Targets().saw_validation_split


def test_a_student_is_trained_resumed_and_rerun(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    short = ("data=digits", "~phases.train", "tracking=none")
    assert in_process(*short, "seed=1").returncode == 0
    (teacher,) = (path.parent.name for path in (tmp_path / "outputs").glob("*/finished"))
    done = in_process("data=digits", "~phases.train", "teacher=ensemble", f"teacher.runs=[{teacher}]")
    assert done.returncode == 0, done.stderr
    (student,) = {path.parent.name for path in (tmp_path / "outputs").glob("*/finished")} - {teacher}
    repeated = in_process(f"rerun='{student}'")
    assert repeated.returncode == 0, repeated.stderr
    (tmp_path / "outputs" / student / "finished").unlink()
    resumed = in_process(f"resume='{student}'")
    assert resumed.returncode == 0, resumed.stderr
    for run in (student, teacher):
        (tmp_path / "outputs" / run / "finished").unlink()
    refused = in_process(f"resume='{student}'")
    assert refused.returncode == 1
    assert f"teacher.runs={teacher}" in refused.stderr


def test_a_run_that_ended_early_can_teach(composed: Compose, digits: Dataset, tmp_path: Path) -> None:
    run = finished(composed("data=digits", "phases.finetune.epochs=50"), digits, tmp_path)
    assert ensemble(digits, tmp_path, [run]).networks


def test_runs_that_cannot_teach(composed: Compose, digits: Dataset, tmp_path: Path) -> None:
    settings = composed("data=digits")
    run, pruned = finished(settings, digits, tmp_path), finished(settings, digits, tmp_path, ended=False)
    other = replace(digits, splits=digits.splits | {"test": replace(digits.splits["test"], digest="other")})
    old = finished(settings, digits, tmp_path)
    weights = torch.load(tmp_path / old / "model" / WEIGHTS)
    del weights["output.bias"]
    torch.save(weights, tmp_path / old / "model" / WEIGHTS)
    cannot = [[name] for name in ("0" * 32, "latest", pruned, old)] + [[run, run]]
    for data, runs in [*((digits, runs) for runs in cannot), (other, [run])]:
        with pytest.raises(UserError) as error:
            ensemble(data, tmp_path, runs)
        assert error.value.key == "teacher.runs"
        assert runs[-1] in str(error.value.value)
