"""The command: from a sweep in the store to the answer in the terminal and the report in MLflow and in a browser."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.compare import make_sweep
from conftest import chromium, exit_status
from mlflow import MlflowClient

from mnist_exp import compare
from mnist_exp.comparison.outcomes import parse_outcome
from mnist_exp.overrides import quoted

Compare = Callable[..., tuple[int, str, str]]
HOSTILE = "<script>document.title='it ran'</script>"


@pytest.fixture
def run_compare(store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Compare:
    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare", *overrides])
        monkeypatch.setattr("mnist_exp.compare.install_signal_handlers", lambda: None)  # pytest keeps its own handlers
        monkeypatch.setenv("COLUMNS", "160")
        status = exit_status(compare.main)
        printed = capfd.readouterr()
        return status, " ".join(printed.out.split()), printed.err

    return run


def report_of(store: str, sweep: str, folder: Path) -> str:
    return Path(MlflowClient(store).download_artifacts(sweep, "report.html", str(folder))).read_text()


def test_the_answer_is_printed_and_the_report_published_in_the_parent(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name", better=0.002)
    status, shown, _ = run_compare("sweep=latest", "factor=model.name", "baseline=plain_cnn")
    assert status == 0
    headline = "In test/accuracy, against model.name=plain_cnn (98.10 %)"
    assert headline in shown
    assert re.search(r"se_cnn is higher( by more than the margin)?: \+0\.\d\d points", shown)
    assert "5 seeds detect a difference of 0." in shown
    assert "Explored: the sweep has no plan" in shown
    run = MlflowClient(store).get_run(sweep)
    assert run.data.tags["answer"].startswith(headline)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"**Answer** {headline}")
    assert "\n\n15 jobs: 15 FINISHED.\n" in note
    assert f"](get-artifact?path=differences.png&run_uuid={sweep})" in note
    names = {f"answer/se_cnn/{end}" for end in ("difference", "low", "high", "p", "n")}
    assert names | {"arm/plain_cnn/test/accuracy", "arm/se_cnn/test/accuracy"} <= run.data.metrics.keys()
    assert run.data.metrics["answer/se_cnn/difference"] == pytest.approx(0.2, abs=0.1), "in points"
    assert not {"test/accuracy", "val/accuracy"} & run.data.metrics.keys(), "the parent is no run of a model"
    page = report_of(store, sweep, tmp_path)
    assert (
        page.index(f"<h1>{headline}") < page.index("<h2>Differences") < page.index("<h2>Every run") < page.index("<h2>Reproduce")
    )
    for part in ("Learning curves", "Cost", "Mistakes", "Configuration differences"):
        assert f"<h2>{part}</h2>" in page, part
    assert "train.setting" not in page, "parameters that are the same in all arms are not shown"
    assert page.count("</svg>\n</figure>") == page.count("<figure ") == 6
    assert page.count("<title>plain_cnn, seed 0, run ") == 3, "a tooltip in each figure that shows runs"
    assert ">difference in test/accuracy" in page, "text is text"
    assert "run:" not in page
    assert page.count('class="digit"') == 12, "the images that the arms disagree on"
    assert f"sweep={sweep} factor=model.name baseline=plain_cnn" in page
    assert HOSTILE not in page, "a model's name is text, not HTML"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page), "the file is self-contained"

    assert run_compare(f"sweep={sweep}", "metrics=[test/loss]")[0] == 0
    repeated = MlflowClient(store).get_run(sweep).data.tags["mlflow.note.content"]
    assert repeated.count("**Answer**") == 1
    assert "In test/loss" in repeated


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=" + "0" * 32], r"There is no sweep 0{32} in .*\. The newest there: [0-9a-f]{32} \(FINISHED\)"),
        (
            ["sweep=last"],
            "sweep=last is invalid: expected the id of a sweep, a prefix of at least 6 hexadecimal digits, latest, or a list",
        ),
        (["factor=optimizer"], "factor=optimizer is invalid: expected a key that the sweep varied besides the seed: model"),
        (["baseline=resnet"], "baseline=resnet is invalid: expected an arm of model: plain_cnn, se_cnn"),
        (["sweep=[latest,x]"], r"sweep=\['latest', 'x'\] is invalid: expected the id of a sweep"),
        (["margin=0"], "margin=0 is invalid: expected a number > 0, in the displayed unit of the metric, or null"),
        (["export=runs.txt"], "export=runs.txt is invalid: expected the path of a file that ends with .csv"),
        (["export=/proc/x/runs.csv"], "export=/proc/x/runs.csv is invalid: it cannot be written: "),
        (["results=missing.csv"], "results=missing.csv is invalid: it cannot be read: "),
        (["metrics=3"], r"metrics=3 is invalid: expected a name, a list such as metrics=\[test/accuracy"),
        (["metrics=[f1]"], "metrics=f1 is invalid: expected a metric that every run has: "),
        (["fctor=model"], "fctor"),
        (["tracking=none"], "tracking=none stores no sweeps"),
        (["tracking._target_=os.system"], "tracking._target_=os.system is not allowed"),
    ],
)
def test_a_mistake_is_one_message(run_compare: Compare, store: str, overrides: list[str], message: str) -> None:
    make_sweep(store, ("plain_cnn", "se_cnn"), seeds=2)
    status, _, error = run_compare(*overrides)
    assert status == 1
    assert re.search(message, error)
    assert "Traceback" not in error


def test_a_table_gives_the_answer_of_the_store(
    run_compare: Compare, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_sweep(store, ("plain_cnn", "se_cnn"), seeds=6)
    table, options = tmp_path / "runs.csv", ("factor=model", "baseline=plain_cnn", "margin=0.1")
    _, from_store, _ = run_compare(*options, "export=runs.csv")
    status, from_table, _ = run_compare("results=runs.csv", "tracking=none", *options)
    assert status == 0
    assert from_store.startswith(from_table), "the same numbers and notes; only the report is missing"
    assert "margin 0.10 points" in from_table

    lines = table.read_text().splitlines(keepends=True)
    accuracy = lines[0].strip().split(",").index("metric:test/accuracy")
    cells = lines[1].split(",")
    cells[accuracy] = "inf"

    def without(column: str, line: int | None = None) -> str:
        """The table without a column, or without its value in one line."""
        rows = list(csv.DictReader(lines))
        for number, row in enumerate(rows, start=2):
            if line is None:
                del row[column]
            elif number == line:
                row[column] = ""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    damaged = {
        "lacks the columns override:seed": without("override:seed"),
        "lacks the columns param:precision": without("param:precision"),
        "lacks a column digest:test or digest:validation": without("digest:test"),
        "has no value of metric:test/accuracy in line 3": without("metric:test/accuracy", 3),
        "has no value of param:precision in line 2": without("param:precision", 2),
        "lacks the columns sweep, job": "a,b\n1,2\n",
        "line 14 repeats run": "".join([*lines, lines[1]]),
        "line 2: metric:test/accuracy=inf is invalid: expected a finite number": lines[0] + ",".join(cells),
        "contains no run": lines[0],
    }
    for message, content in damaged.items():
        (tmp_path / "bad.csv").write_text(content)
        status, _, error = run_compare(f"results={tmp_path}/bad.csv", *options)
        assert status == 1
        assert message in error
        assert "Traceback" not in error


def test_several_sweeps_are_compared_together(run_compare: Compare, store: str) -> None:
    first = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=3)
    second = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=5)
    status, shown, _ = run_compare(f"sweep=[{first},{second[:8]}]", "factor=model")
    assert status == 0
    assert "2 of 5 seeds were added after the first job had started" in shown
    assert "duplicated: plain_cnn seed=0" in shown
    answers = {MlflowClient(store).get_run(sweep).data.tags["answer"] for sweep in (first, second)}
    assert len(answers) == 1


def test_one_seed_is_too_few(run_compare: Compare, store: str) -> None:
    make_sweep(store, ("plain_cnn", "se_cnn"), seeds=1)
    assert "No arm of model has two seeds of finished runs with model=plain_cnn" in run_compare()[2]


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
def test_an_invalid_outcome_is_counted_not_drawn(outcome: str) -> None:
    try:
        content = json.loads(outcome)
    except ValueError:
        content = None
    assert parse_outcome(content) is None


def test_foreign_and_broken_stores_get_a_message(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "$a_$", "[8,16]"), seeds=2, factor="model.name")
    files = Path(MlflowClient(store).get_run(sweep).info.artifact_uri.removeprefix("file://"))
    for child in MlflowClient(store).search_runs(["1"], f"tags.sweep_id = '{sweep}'")[:2]:
        Path(child.info.artifact_uri.removeprefix("file://"), "outcome.json").write_text('{"history": 1}')
    status, shown, _ = run_compare("baseline=[8,16]")
    assert status == 0, "an arm's name is the typed text, not a formula"
    assert "against model.name=[8,16]" in shown
    assert "2 runs have no readable history and mistakes" in report_of(store, sweep, tmp_path)
    (files / "report.html").unlink()
    (files / "report.html").mkdir()
    status, shown, error = run_compare()
    assert (status, "In test/accuracy, against" in shown) == (1, True), "the answer is shown before it is stored"
    assert "report.html cannot be added to run" in error
    for broken in ("", "[]", '{"jobs": 1}', '{"jobs": [{"number": 0, "overrides": [1]}], "overrides": []}'):
        (files / "sweep.json").write_text(broken)
        assert "has no readable sweep.json" in run_compare()[2]
    assert "removes tracking" in run_compare("~tracking")[2]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
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
