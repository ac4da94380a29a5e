from pathlib import Path

import pytest
import torch
from conftest import CommandLine, finished
from hydra import compose, initialize_config_dir

from mnist_exp import CONF
from mnist_exp.config import build, resolve
from mnist_exp.errors import UserError
from mnist_exp.learning.data import load_digits
from mnist_exp.learning.distillation import Ensemble
from mnist_exp.storage import checkpoint, run_dir


def test_the_targets_are_what_the_runs_say_on_average(composed, tmp_path: Path) -> None:
    digits = load_digits(0.02, seed=0)
    images, labels = digits.splits["test"].images[:5], digits.splits["test"].labels[:5]
    runs = [finished(composed("data=digits", f"model={model}"), digits, tmp_path) for model in ("se_cnn", "plain_cnn")]
    said = []
    for run in runs:
        saved = checkpoint.load(tmp_path / run / "checkpoint.pt")
        network = build(saved.config["model"], "model").eval()
        network.load_state_dict(saved.state["model"])
        said.append(network(images).softmax(1))
    targets = Ensemble(digits, tmp_path, runs)(images, labels)
    torch.testing.assert_close(targets, (said[0] + said[1]) / 2)


def test_a_student_is_trained_resumed_and_run_again(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    short = ("data=digits", "~phases.train", "tracking=none")
    assert in_process(*short, "seed=1").returncode == 0
    (teacher,) = (path.parent.name for path in (tmp_path / "outputs").glob("*/finished"))
    done = in_process("data=digits", "~phases.train", "teacher=ensemble", f"teacher.runs=[{teacher}]")
    assert done.returncode == 0, done.stderr
    (student,) = {path.parent.name for path in (tmp_path / "outputs").glob("*/finished")} - {teacher}
    again = in_process(f"rerun={student}")
    assert f"came out identical to run {student}" in again.stdout, again.stderr
    (tmp_path / "outputs" / student / "finished").unlink()
    resumed = in_process(f"resume={student}")
    assert resumed.returncode == 0, resumed.stderr
    (tmp_path / "outputs" / student / "finished").unlink()
    (tmp_path / "outputs" / teacher / "finished").unlink()
    refused = in_process(f"resume={student}")
    assert refused.returncode == 1
    assert f"teacher.runs: {teacher} is no finished run in output_dir=" in refused.stderr


def test_runs_that_cannot_teach(in_process: CommandLine, tmp_path: Path, mnist_root: Path) -> None:
    outputs, digits = tmp_path / "outputs", load_digits(0.02, seed=0)
    with initialize_config_dir(str(CONF), version_base="1.3"):  # closed again, for the command line to open its own
        config = resolve(compose("config", ["data=digits"]))
    run, pruned = finished(config, digits, outputs), finished(config, digits, outputs, epochs=0.5)
    nobody = "0" * 32
    for overrides, message in (
        (("data=digits", f"teacher.runs=[{nobody}]"), f"teacher.runs: {nobody} is no finished run in output_dir="),
        (("data=digits", f"teacher.runs=[{pruned}]"), f"teacher.runs: {pruned} was stopped before its last epoch"),
        (("data=digits",), "teacher.runs=[] is not valid: allowed is a list of the ids of finished runs"),
        (("data=digits", "teacher.runs=[latest]"), "teacher.runs=['latest'] is not valid"),
        (("data=digits", f"teacher.runs=[{run},{run}]"), "each of 32 hexadecimal digits and named once"),
        (("data=digits", f"teacher.runs=[{run}]", "+teacher.colour=1"), "unexpected keyword argument 'colour'"),
        (("data=mnist_tuning", f"teacher.runs=[{run}]"), "may have been trained on the validation split of this data"),
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
    with pytest.raises(UserError, match=f"the network of {run} is not the one that this version builds"):
        Ensemble(digits, tmp_path, [run])
