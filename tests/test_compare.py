"""From a sweep in the store to the answer in the terminal, the report in MLflow, and both in a browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_compare import make_sweep
from conftest import chromium
from mlflow import MlflowClient

from mnist_exp import compare
from mnist_exp.overrides import quoted
from mnist_exp.report import understood

Compare = Callable[..., tuple[int, str, str]]
HOSTILE = "<script>document.title='it ran'</script>"


@pytest.fixture
def run_compare(store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Compare:
    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare", *overrides])
        monkeypatch.setattr("mnist_exp.compare.raise_interrupted", lambda: None)  # pytest keeps its own handlers
        monkeypatch.setenv("COLUMNS", "160")
        try:
            compare.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capfd.readouterr()
        return status, " ".join(printed.out.split()), printed.err

    return run


def report_of(store: str, sweep: str, folder: Path) -> str:
    return Path(MlflowClient(store).download_artifacts(sweep, "report.html", str(folder))).read_text()


def test_the_answer_is_printed_and_the_report_left_in_the_parent(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name")
    status, shown, _ = run_compare("sweep=latest", "factor=model.name", "baseline=plain_cnn")
    assert status == 0
    said = "In test/accuracy, against model.name=plain_cnn (98.10 %)"
    assert said in shown
    assert "se_cnn is higher by 0.1" in shown
    assert "can show differences of 0." in shown
    run = MlflowClient(store).get_run(sweep)
    assert run.data.tags["answer"].startswith(said)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"**Answer** {said}")
    assert note.endswith("15 jobs: 15 FINISHED.")
    page = report_of(store, sweep, tmp_path)
    assert page.index(f"<h1>{said}") < page.index("<h2>Differences") < page.index("<h2>Every run") < page.index("<h2>Repeat it")
    for part in ("Learning curves", "What it costs", "Where they err", "What differs in the configuration", "train.setting"):
        assert (part in page) == (part != "train.setting"), part  # settings that are the same everywhere are not shown
    assert page.count('src="data:image/svg+xml') == 6
    assert page.count('class="digit"') == 12, "pictures of the images that divide the arms"
    assert f"sweep={sweep} factor=model.name baseline=plain_cnn" in page
    assert HOSTILE not in page, "a model's name is text, not HTML"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page), "the file needs nothing outside itself"

    assert run_compare(f"sweep={sweep}", "metrics=[test/loss]")[0] == 0
    again = MlflowClient(store).get_run(sweep).data.tags["mlflow.note.content"]
    assert again.count("**Answer**") == 1
    assert "In test/loss" in again


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=" + "0" * 32], r"there is no such sweep in .*; those there: [0-9a-f]{32} \(FINISHED\)"),
        (["sweep=last"], "sweep=last is not valid: allowed is a sweep's id of 32 hexadecimal digits, or latest"),
        (["factor=optimizer"], "factor=optimizer did not vary in this sweep: those that did are model"),
        (["baseline=resnet"], "baseline=resnet is not an arm of model: its arms are plain_cnn, se_cnn"),
        (["metrics=3"], r"metrics=3 is not valid: allowed is a name, a list such as metrics=\[test/accuracy"),
        (["metrics=[f1]"], "not every run has f1; what all have is"),
        (["fctor=model"], "fctor"),
        (["tracking=none"], "tracking=none holds no sweeps"),
        (["tracking._target_=os.system"], "tracking._target_=os.system is not allowed"),
    ],
)
def test_a_mistake_is_one_message(run_compare: Compare, store: str, overrides: list[str], message: str) -> None:
    make_sweep(store, ("plain_cnn", "se_cnn"), seeds=2)
    status, _, error = run_compare(*overrides)
    assert status == 1
    assert re.search(message, error)
    assert "Traceback" not in error


def test_one_seed_is_too_few(run_compare: Compare, store: str) -> None:
    make_sweep(store, ("plain_cnn", "se_cnn"), seeds=1)
    assert "No arm of model has two pairs of finished runs with model=plain_cnn" in run_compare()[2]


OUTCOMES = [
    "",
    "{",
    "[]",
    "{}",
    '{"history": null, "mistakes": [], "split": "test"}',
    '{"history": [], "mistakes": [[1]], "split": 1}',
]
OUTCOMES += ['{"history": [[1, {"train/loss": 1, "train/examples_per_second": 0}]], "mistakes": [], "split": "test"}']
OUTCOMES += [
    '{"history": [], "mistakes": [[0, 10, -1]], "split": "test"}',
    '{"history": [[1e999, {}]], "mistakes": [], "split": ""}',
]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_that_cannot_be_understood_is_counted_not_drawn(outcome: str) -> None:
    try:
        content = json.loads(outcome)
    except ValueError:
        content = None
    assert understood(content) is None


def test_foreign_and_broken_stores_are_answered_in_words(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "$a_$", "[8,16]"), seeds=2, factor="model.name")
    files = Path(MlflowClient(store).get_run(sweep).info.artifact_uri.removeprefix("file://"))
    for child in MlflowClient(store).search_runs(["1"], f"tags.sweep_id = '{sweep}'")[:2]:
        Path(child.info.artifact_uri.removeprefix("file://"), "outcome.json").write_text('{"history": 1}')
    status, shown, _ = run_compare("baseline=[8,16]")
    assert status == 0, "an arm's name is what was typed, and no formula"
    assert "against model.name=[8,16]" in shown
    assert "2 runs left no history and mistakes that could be read" in report_of(store, sweep, tmp_path)
    (files / "report.html").unlink()
    (files / "report.html").mkdir()
    status, shown, error = run_compare()
    assert (status, "In test/accuracy, against" in shown) == (1, True), "what was found is shown before it is stored"
    assert "report.html could not be left in run" in error
    for broken in ("", "[]", '{"jobs": 1}', '{"jobs": [{"number": 0, "overrides": [1]}], "overrides": []}'):
        (files / "sweep.json").write_text(broken)
        assert "it has no sweep.json that can be read" in run_compare()[2]
    assert "adds or removes tracking" in run_compare("~tracking")[2]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="the report is looked at in chromium, which is not installed")
def test_the_report_reads_on_a_phone_and_prints(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name")
    assert run_compare("baseline=plain_cnn")[0] == 0
    page = report_of(store, sweep, tmp_path)
    assert "it ran" in page
    measured = "<script>document.body.dataset.widths = [document.documentElement.scrollWidth, innerWidth]</script></body>"
    file = tmp_path / "phone.html"
    file.write_text(page.replace("</body>", measured))
    shown = browse(f"file://{file}", tmp_path, "--window-size=500,900", "--dump-dom").stdout
    assert "<title>it ran</title>" not in shown
    widths = re.search(r'data-widths="(\d+),(\d+)"', shown)
    assert widths, "the script that measures ran"
    assert int(widths[1]) <= int(widths[2]), "nothing is wider than the screen"
    printed, picture = tmp_path / "report.pdf", tmp_path / "report.png"
    browse(f"file://{file}", tmp_path, f"--print-to-pdf={printed}")
    browse(f"file://{file}", tmp_path, "--window-size=900,3000", f"--screenshot={picture}")
    assert printed.stat().st_size > 50_000
    assert picture.stat().st_size > 50_000


def browse(address: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = chromium()
    assert program
    usual = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    shutil.rmtree(folder / "profile", ignore_errors=True)
    command = [program, *usual, f"--user-data-dir={folder}/profile", *flags, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
