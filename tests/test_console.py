import io

from rich.console import Console

from mnist_exp.cli import safe_output
from mnist_exp.console import Display, show_table


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
