from pathlib import Path

import torch
from conftest import Compose

from mnist_exp.experiment.figures import confusion_matrix, learning_curves, worst_mistakes
from mnist_exp.experiment.recorder import recording
from mnist_exp.learning.evaluation import Evaluation
from mnist_exp.learning.training import Report
from mnist_exp.settings import Recipe
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking.base import RunInfo, Store


def test_the_curves_of_phases_are_separate_also_after_an_early_end_and_a_resume(composed: Compose, tmp_path: Path) -> None:
    def report(phase: str, seen: int) -> Report:
        return Report(phase, seen, 1.0, {"train/loss": 1.0, "train/accuracy": 0.5}, state={"examples_seen": seen})

    start = Checkpoint("", Recipe(composed("tracking=none", f"output_dir={tmp_path}")))
    with recording(Store(), RunInfo("name", "command"), start, 0.0) as recorder:
        for seen in (100, 180):  # of more that were planned
            recorder.log_report(report("train", seen))
        recorder.log_report(report("finetune", 200))
    saved = checkpoint.load(recorder.folder / run_dir.CHECKPOINT)
    with run_dir.lock_run(recorder.folder), recording(Store(), RunInfo("name", "command"), saved, 0.0) as recorder:
        recorder.log_report(report("finetune", 220))
        recorder.log_report(report("last", 300))
    assert recorder.phase_starts == {"train": 0, "finetune": 180, "last": 220}
    drawn = [line.get_xdata().tolist() for line in learning_curves(recorder.history, recorder.phase_starts).axes[0].lines[:3]]
    assert drawn == [[100, 180], [200, 220], [300]]


def test_the_worst_mistakes_are_grouped_by_confusion_and_names_are_whole(tmp_path: Path) -> None:
    names = ["cat", "german_shepherd_dog", r"a_$\name$_of_more_than_thirty_characters"]
    labels, predictions = torch.tensor([0, 0, 1, 2, 1, 0]), torch.tensor([2, 1, 0, 2, 0, 1])
    logits = torch.eye(3)[predictions] * torch.tensor([[9.0], [3], [5], [5], [1], [4]])
    evaluation = Evaluation(logits, labels)
    figure = worst_mistakes(evaluation, torch.zeros(6, 3, 32, 32, dtype=torch.uint8), names)
    found = ["".join(text.get_text().split()).split(",")[0] for text in figure.axes[0].texts]
    pairs = [(0, 1), (0, 1), (1, 0), (1, 0), (0, 2)]
    assert found == [f"{names[label]}>{names[prediction]}" for label, prediction in pairs]
    figure.savefig(tmp_path / "mistakes.png")
    confusion_matrix(evaluation, names, "title").savefig(tmp_path / "matrix.png")
