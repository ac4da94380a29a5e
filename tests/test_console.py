import io

from rich.console import Console

from mnist_exp.console import Display
from mnist_exp.data import Dataset


class _Stage:
    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.phase = type("Phase", (), {"split": split, "epochs": 1})


def test_a_bar_shows_no_figure_that_nobody_measured(short_digits: Dataset) -> None:
    """A run that is gone on with and has nothing left to train has measured nothing."""
    seen = sum(short_digits.splits[name].epoch_size for name in ("train", "finetune"))
    display = Display([_Stage("train", "train"), _Stage("finetune", "finetune")], short_digits, seen, quiet=False)
    shown = io.StringIO()
    Console(file=shown, width=100).print(display.progress)
    assert shown.getvalue().count("100%") == 2
    assert "loss" not in shown.getvalue()
    assert "0.0000" not in shown.getvalue()
