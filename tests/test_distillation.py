from pathlib import Path

import pytest
import torch
from conftest import CommandLine

from mnist_exp import checkpoint
from mnist_exp.config import build
from mnist_exp.data import load_digits
from mnist_exp.distillation import Ensemble

SHORT = ("data=digits", "~phases.train", "tracking=none")


@pytest.fixture
def teachers(in_process: CommandLine, tmp_path: Path) -> list[str]:
    """Train two networks, and return the ids of their runs."""
    for seed in (1, 2):
        assert in_process(*SHORT, f"seed={seed}", "model=plain_cnn").returncode == 0
    return sorted(path.parent.name for path in (tmp_path / "outputs").glob("*/finished"))


def test_a_student_aims_at_the_mean_of_its_teachers(teachers: list[str], in_process: CommandLine, tmp_path: Path) -> None:
    digits = load_digits(0.02, seed=0)
    images, labels = digits.splits["test"].images[:5], digits.splits["test"].labels[:5]
    targets = Ensemble(digits, tmp_path / "outputs", teachers)(images, labels)
    said = []
    for run in teachers:
        saved = checkpoint.load(tmp_path / "outputs" / run / "checkpoint.pt")
        network = build(saved.config["model"], "model").eval()
        network.load_state_dict(saved.state["model"])
        said.append(network(images).softmax(1))
    torch.testing.assert_close(targets, (said[0] + said[1]) / 2)
    done = in_process(*SHORT, "teacher=ensemble", f"teacher.runs=[{','.join(teachers)}]", "phases.finetune.max_grad_norm=null")
    assert done.returncode == 0, done.stderr
    (student,) = {path.parent.name for path in (tmp_path / "outputs").glob("*/finished")} - set(teachers)
    history = checkpoint.load(tmp_path / "outputs" / student / "checkpoint.pt").history
    assert history[0][1]["train/loss"] == pytest.approx(2.3, abs=0.1), "towards what two hardly trained networks say"


def test_runs_that_cannot_teach(teachers: list[str], in_process: CommandLine, tmp_path: Path, mnist_root: Path) -> None:
    nobody = "0" * 32
    for data, runs, message in (
        ("digits", nobody, f"teacher.runs: {nobody} is no finished run in output_dir="),
        ("digits", "", "teacher.runs=[] is not valid: allowed is a list of the ids of finished runs"),
        ("digits", "latest", "teacher.runs=['latest'] is not valid"),
        ("mnist_tuning", teachers[0], "was trained on other data, of which the validation split may be a part"),
    ):
        done = in_process("tracking=none", f"data={data}", "teacher=ensemble", f"teacher.runs=[{runs}]")
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert len(list((tmp_path / "outputs").iterdir())) == 2
