from pathlib import Path

import pytest
import torch
from conftest import CommandLine, finished

from mnist_exp.errors import UserError
from mnist_exp.experiment.teachers import ensemble
from mnist_exp.learning.datasets import load_digits
from mnist_exp.settings import build
from mnist_exp.storage import checkpoint, run_dir


def test_the_targets_are_the_mean_predictions_of_the_runs(composed, tmp_path: Path) -> None:
    digits = load_digits(0.02, seed=0)
    images, labels = digits.splits["test"].images[:5], digits.splits["test"].labels[:5]
    runs = [finished(composed("data=digits", f"model={model}"), digits, tmp_path) for model in ("se_cnn", "plain_cnn")]
    predictions = []
    for run in runs:
        saved = checkpoint.load(tmp_path / run / "checkpoint.pt")
        network = build(saved.recipe.settings.model, "model", **saved.recipe.settings.shape).eval()
        network.load_state_dict(saved.state["model"])
        predictions.append(network(images).softmax(1))
    targets = ensemble(digits, tmp_path, runs)(images, labels)
    torch.testing.assert_close(targets, (predictions[0] + predictions[1]) / 2)


def test_a_student_is_trained_resumed_and_rerun(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    short = ("data=digits", "~phases.train", "tracking=none")
    assert in_process(*short, "seed=1").returncode == 0
    (teacher,) = (path.parent.name for path in (tmp_path / "outputs").glob("*/finished"))
    done = in_process("data=digits", "~phases.train", "teacher=ensemble", f"teacher.runs=[{teacher}]")
    assert done.returncode == 0, done.stderr
    (student,) = {path.parent.name for path in (tmp_path / "outputs").glob("*/finished")} - {teacher}
    repeated = in_process(f"rerun={student}")
    assert f"is identical to run {student}" in repeated.stdout, repeated.stderr
    (tmp_path / "outputs" / student / "finished").unlink()
    resumed = in_process(f"resume={student}")
    assert resumed.returncode == 0, resumed.stderr
    (tmp_path / "outputs" / student / "finished").unlink()
    (tmp_path / "outputs" / teacher / "finished").unlink()
    refused = in_process(f"resume={student}")
    assert refused.returncode == 1
    assert f"teacher.runs={teacher} is invalid: expected a finished run in output_dir=" in refused.stderr


def test_runs_that_cannot_teach(in_process: CommandLine, tmp_path: Path, mnist_root: Path) -> None:
    outputs, digits = tmp_path / "outputs", load_digits(0.02, seed=0)
    with initialize_config_dir(str(CONF), version_base="1.3"):  # closed here, because the command line opens its own
        config = resolve(compose("config", ["data=digits"]))
    run, pruned = finished(config, digits, outputs), finished(config, digits, outputs, epochs=0.5)
    nobody = "0" * 32
    for overrides, message in (
        (("data=digits", f"teacher.runs=[{nobody}]"), f"teacher.runs={nobody} is invalid: expected a finished run"),
        (("data=digits", f"teacher.runs=[{pruned}]"), f"teacher.runs={pruned} is invalid: expected a run that was trained to"),
        (("data=digits",), "teacher.runs=[] is invalid: expected a list of different ids of finished runs"),
        (("data=digits", "teacher.runs=[latest]"), "teacher.runs=['latest'] is invalid"),
        (("data=digits", f"teacher.runs=[{run},{run}]"), "a list of different ids"),
        (("data=digits", f"teacher.runs=[{run}]", "+teacher.weight=1"), "unexpected keyword argument 'weight'"),
        (("data=mnist_tuning", f"teacher.runs=[{run}]"), "not trained on the validation split of this data"),
    ):
        done = in_process("tracking=none", "teacher=ensemble", *overrides)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert len(list(outputs.iterdir())) == 2


def test_a_network_of_another_version_cannot_teach(composed, tmp_path: Path) -> None:
    digits = load_digits(0.02, seed=0)
    run = finished(composed("data=digits"), digits, tmp_path)
    saved = checkpoint.load(tmp_path / run / run_dir.CHECKPOINT)
    del saved.state["model"]["output.bias"]
    checkpoint.save(tmp_path / run, saved)
    with pytest.raises(UserError, match=f"teacher.runs={run} is invalid: expected a network as this version builds it"):
        ensemble(digits, tmp_path, [run])
