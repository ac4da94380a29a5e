import io
import re

import pytest
from rich.console import Console

from mnist_exp.console import (
    Display,
    show_comparison,
    show_lines,
    show_pairs,
    show_sweep,
    show_table,
    show_warning,
    sweep_progress,
)

ID = "0123456789abcdef" * 2
ARMS = ("plain_cnn_matched", "se_cnn_separable_small")
SWEPT = [
    {
        "job": str(number),
        "name": f"{arm} bs=256 optimizer.lr=0.012345 seed={number}",
        "status": status,
        "val/accuracy": "98.67 %",
        "test/accuracy": "100.00 %",
        "test/loss": "0.0432",
        "time/total_seconds": "1,123.46 s",
        "run": ID,
        "error": error,
    }
    for number, (arm, status, error) in enumerate(
        [(ARMS[0], "FINISHED", ""), (ARMS[1], "NOT STARTED", ""), (ARMS[1], "FAILED", "Out of memory. " * 9)]
    )
]
COMPARED = [
    {
        "model": arm,
        "verdict": "lower by more than the margin",
        "batch_size": "mean of the levels",
        "n": "17 of 20 pairs",
        "difference (95 %)": difference,
        "p": "1.2e-05",
    }
    for arm, difference in zip(ARMS, ("+0.21 points (+0.10 to +0.32)", "-1,234.56 s (-1,334.56 to -1,134.56)"), strict=True)
]
RESULTS = {
    "test/accuracy": "98.60 %",
    "data": "mnist: train 58,800, finetune 1,200, test 10,000, validation 1,200",
    "run": ID,
    "checkpoint": f"../a/folder/that/is/far/away/outputs/{ID}/checkpoint.pt",
}
LISTED = [{key: row[key] for key in ("run", "name", "status", "val/accuracy", "test/accuracy")} for row in SWEPT]
UNMEASURED = {"run", "checkpoint", "p", "time/total_seconds"}  # ids, and columns that are omitted


def shown_at(width: int, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    if table == "end of a run":
        Display({}, {}, 0, "val/accuracy", quiet=False).results(RESULTS, "", {})
    elif table == "sweep":
        show_sweep(SWEPT, "")
    elif table == "comparison":
        show_comparison("title", "subtitle", [COMPARED], ["note"])
    else:
        show_table(LISTED, optional=("val/accuracy",))
    return capsys.readouterr().out


@pytest.mark.parametrize("table", ["end of a run", "sweep", "comparison", "list"])
def test_a_table_fits_80_columns_and_breaks_no_number(table: str, monkeypatch, capsys) -> None:
    shown = shown_at(80, table, monkeypatch, capsys)
    assert max(map(len, shown.splitlines())) <= 80, shown
    source = {"end of a run": [RESULTS], "sweep": SWEPT, "comparison": COMPARED, "list": LISTED}[table]
    for text in (row[key] for row in source for key in row.keys() - UNMEASURED):
        for number in re.findall(r"(?<![\w.])[-+]?\d[\d,.]*\d(?: (?:%|s|points)(?!\w))?", text):
            assert re.search(rf"(?<![\w.]){re.escape(number)}(?![\w.])", shown), f"{number} is broken:\n{shown}"
    assert "\u2026" not in shown, "an ellipsis hides the rest"


@pytest.mark.parametrize(("table", "rest"), [("sweep", "1,123.46 s"), ("comparison", "1.2e-05"), ("list", ID)])
def test_a_wide_terminal_gets_the_rest(table: str, rest: str, monkeypatch, capsys) -> None:
    assert rest not in shown_at(80, table, monkeypatch, capsys)
    assert rest in shown_at(250, table, monkeypatch, capsys)


def test_text_is_shown_as_it_is_but_for_control_characters(monkeypatch, capsys) -> None:
    """A name is not markup, and an error of a server cannot change the title of the terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    text = "[red]se_cnn[/red] :warning: [/] \x1b]0;title\x07"
    display = Display({text: 60}, {text: 1}, 0, "val/accuracy", quiet=False)
    show_table([{"name": text, "status": "FAILED", "error": text}])
    show_pairs(text, {text: text})
    show_lines([text])
    show_warning(text)
    display.results({text: text}, text, {text: text})
    display.update(text, 60, EPOCH, 1)
    Console(force_terminal=True).print(display.progress)
    shown = capsys.readouterr().out
    assert shown.count("[red]se_cnn[/red] :warning: [/]") == 15
    assert "\x1b]" not in shown


EPOCH = {"train/loss": 0.05581, "train/accuracy": 0.98061, "train/examples_per_second": 14_471.2}


def test_without_a_terminal_each_epoch_has_a_line(capsys) -> None:
    with Display({"train": 200, "finetune": 10}, {"train": 2, "finetune": 1}, 0, "val/accuracy", quiet=False) as display:
        for examples, epoch in ((50, None), (100, 1), (150, None), (200, 2)):
            validation = {"val/accuracy": 0.9825} if examples % 100 == 0 else {}
            display.update("train", examples, EPOCH | validation, epoch)
        display.update("finetune", 210, EPOCH, 1)
    measured = "loss 0.0558, accuracy 98.06 %"
    assert capsys.readouterr().out.splitlines() == [
        f"train: epoch 1 of 2, {measured}, val/accuracy 98.25 %, 14,471 examples/s",
        f"train: epoch 2 of 2, {measured}, val/accuracy 98.25 %, 14,471 examples/s",
        f"finetune: epoch 1 of 1, {measured}, 14,471 examples/s",
    ]


def test_a_job_of_a_sweep_shows_nothing(capsys) -> None:
    with Display({"train": 100}, {"train": 1}, 0, "val/accuracy", quiet=True) as display:
        display.update("train", 100, EPOCH, 1)
        display.results(RESULTS, "", {})
    assert not capsys.readouterr().out


def test_without_a_terminal_a_sweep_has_a_line_when_jobs_have_ended(capsys) -> None:
    for result in ((0, 0, "-"), (3, 1, "98.62 %")):
        with sweep_progress(10, lambda result=result: result):
            pass
    assert capsys.readouterr().out == "3 of 10 jobs finished, 1 failed or stopped, best 98.62 %\n"


def test_a_bar_shows_no_figure_that_nobody_measured() -> None:
    """A resumed run with nothing left to train has measured nothing."""
    display = Display({"train": 58_800, "finetune": 1_200}, {"train": 1, "finetune": 1}, 60_000, "val/accuracy", quiet=False)
    shown = io.StringIO()
    Console(file=shown, width=100).print(display.progress)
    assert shown.getvalue().count("100%") == 2
    assert "loss" not in shown.getvalue()
    assert "0.0000" not in shown.getvalue()
