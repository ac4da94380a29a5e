import io
import re

import pytest
from rich.console import Console

from mnist_exp.cli import safe_output
from mnist_exp.console import Display, SweepDisplay, show_comparison, show_table


def test_a_bar_shows_no_figure_that_nobody_measured() -> None:
    """A resumed run with nothing left to train has measured nothing."""
    display = Display({"train": 58_800, "finetune": 1_200}, 60_000, quiet=False)
    shown = io.StringIO()
    Console(file=shown, width=100).print(display.progress)
    assert shown.getvalue().count("100%") == 2
    assert "loss" not in shown.getvalue()
    assert "0.0000" not in shown.getvalue()


def test_credentials_and_control_characters_of_a_store_do_not_reach_the_terminal(capsys) -> None:
    """Rich wraps long cells, which would split a password in two before the output is masked."""
    error = "http://user:longpassword@127.0.0.1:5000 refuses the records of the run, \x1b]0;title\x07"
    with safe_output():
        show_table([{"job": "0", "name": "se_cnn bs=64", "status": "FAILED", "test/accuracy": "0.98", "error": error}])
    shown = capsys.readouterr().out
    assert "long" not in shown
    assert "\x1b]" not in shown


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
    dict(zip(("metric", "arm", "n", "mean (sd)", "difference (95 %)", "p: t / flip", "effect", "differs"), line, strict=True))
    for metric, mean, difference in (
        ("test/accuracy", "98.60 % (0.06)", "+0.21 points (+0.10 to +0.32)"),
        ("time/total_seconds", "1,123.45 s (12.34)", "-1,234.56 s (-1,334.56 to -1,134.56)"),
        ("model/parameters", "19,674 (0)", "+1,234 (always)"),
    )
    for line in (
        (metric, ARMS[0], "20", mean, "", "", "", ""),
        ("", ARMS[1], "20", mean, difference, "1.2e-05 / 0.00049", "+12.34", "not detected"),
    )
]
RESULTS = {
    "test/accuracy": "98.60 %",
    "data": "mnist: train 58,800, finetune 1,200, test 10,000, validation 1,200",
    "run": ID,
    "checkpoint": f"../a/folder/that/is/far/away/outputs/{ID}/checkpoint.pt",
}
LISTED = [{key: row[key] for key in ("run", "name", "status", "val/accuracy", "test/accuracy")} for row in SWEPT]
UNMEASURED = {"run", "checkpoint", "effect", "p: t / flip", "time/total_seconds"}  # ids, and columns that are omitted


def shown_at(width: int, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    if table == "end of a run":
        Display({}, 0, quiet=False).results(RESULTS, None, {})
    elif table == "sweep":
        SweepDisplay(3).results(SWEPT, None)
    elif table == "comparison":
        show_comparison(COMPARED, "headline", ["note"])
    else:
        show_table(LISTED, optional=("val/accuracy",))
    return capsys.readouterr().out


@pytest.mark.parametrize("table", ["end of a run", "sweep", "comparison", "list"])
def test_a_table_fits_80_columns_and_breaks_no_number(table: str, monkeypatch, capsys) -> None:
    shown = shown_at(80, table, monkeypatch, capsys)
    assert max(map(len, shown.splitlines())) <= 80, shown
    source = {"end of a run": [RESULTS], "sweep": SWEPT, "comparison": COMPARED, "list": LISTED}[table]
    for text in (row[key] for row in source for key in row.keys() - UNMEASURED):
        for number in re.findall(r"(?<![\w.])[-+]?\d[\d,.]*\d(?: %)?", text):
            assert re.search(rf"(?<![\w.]){re.escape(number)}(?![\w.])", shown), f"{number} is broken:\n{shown}"
    assert "\u2026" not in shown, "an ellipsis hides the rest"


@pytest.mark.parametrize(("table", "rest"), [("sweep", "1,123.46 s"), ("comparison", "+12.34"), ("list", ID)])
def test_a_wide_terminal_gets_the_rest(table: str, rest: str, monkeypatch, capsys) -> None:
    assert rest not in shown_at(80, table, monkeypatch, capsys)
    assert rest in shown_at(250, table, monkeypatch, capsys)
