"""The command: from a sweep in the store to the answer in the terminal and the report in MLflow and in a browser."""

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.compare import make_sweep
from conftest import Call, chromium
from mlflow import MlflowClient

from mnist_exp import compare
from mnist_exp.comparison.outcomes import parse_outcome
from mnist_exp.overrides import quoted

Compare = Callable[..., tuple[int, str, str]]
HOSTILE = "<script>document.title='it ran'</script>"


@pytest.fixture
def run_compare(call: Call, monkeypatch: pytest.MonkeyPatch) -> Compare:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = call(compare.main, *arguments)
        assert "Traceback" not in done.stderr
        return done.returncode, " ".join(done.stdout.split()), done.stderr

    return run


@pytest.fixture(scope="module")
def two_models(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of a sweep of two models, with six seeds."""
    folder = tmp_path_factory.mktemp("two_models")
    shutil.copyfile(template_database, folder / "mlflow.db")
    make_sweep(store := f"sqlite:///{folder}/mlflow.db", ("plain_cnn", "se_cnn"), seeds=6)
    return store


def report_of(store: str, sweep: str, folder: Path) -> str:
    return Path(MlflowClient(store).download_artifacts(sweep, "report.html", str(folder))).read_text()


def test_the_answer_is_printed_and_the_report_published_in_the_parent(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name", better=0.002)
    status, shown, _ = run_compare("latest", "--factor", "model.name", "--baseline", "plain_cnn")
    assert status == 0
    headline = "In test/accuracy, against model.name=plain_cnn (98.10 %)"
    assert headline in shown
    assert re.search(r"se_cnn is higher( by more than the margin)?: \+0\.\d\d points", shown)
    run = MlflowClient(store).get_run(sweep)
    assert run.data.tags["answer"].startswith(headline)
    note = run.data.tags["mlflow.note.content"]
    assert headline in note.splitlines()[0]
    assert f"](get-artifact?path=differences.png&run_uuid={sweep})" in note
    names = {f"answer/se_cnn/{end}" for end in ("difference", "low", "high", "p", "n")}
    assert names | {"arm/plain_cnn/test/accuracy", "arm/se_cnn/test/accuracy"} <= run.data.metrics.keys()
    assert run.data.metrics["answer/se_cnn/difference"] == pytest.approx(0.2, abs=0.1), "in points"
    assert not {"test/accuracy", "val/accuracy"} & run.data.metrics.keys(), "the parent is no run of a model"
    page = report_of(store, sweep, tmp_path)
    parts = ("Differences", "Every run", "Learning curves", "Cost", "Mistakes", "Configuration differences", "Reproduce")
    assert all(f"<h2>{part}</h2>" in page for part in parts)
    assert page.index(f"<h1>{headline}") < page.index("<h2>Differences")
    assert "train.setting" not in page, "parameters that are the same in all arms are not shown"
    assert page.count("</svg>\n</figure>") == page.count("<figure ") == 5
    assert page.count("<title>plain_cnn, seed 0, run ") == 3, "a tooltip in each figure that shows runs"
    assert ">difference in test/accuracy" in page, "text is text"
    assert "run:" not in page
    assert page.count('class="digit"') == 12, "the images that the arms disagree on"
    assert f"{sweep} --factor model.name --baseline plain_cnn" in page
    assert HOSTILE not in page, "a model's name is text, not HTML"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page), "the file is self-contained"

    assert run_compare(sweep[:8], "--metric", "test/loss")[0] == 0
    repeated = MlflowClient(store).get_run(sweep).data.tags["mlflow.note.content"]
    assert (headline in repeated, "In test/loss" in repeated) == (False, True), "a new answer replaces the old one"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["0" * 32], ["0" * 32]),
        (["last"], ["last"]),
        (["latest", "x"], ["x"]),
        (["--factor", "optimizer"], ["--factor optimizer", "model"]),
        (["--baseline", "resnet"], ["--baseline resnet", "plain_cnn, se_cnn"]),
        (["--margin", "0"], ["--margin", "'0'"]),
        (["--export", "runs.txt"], ["--export", "runs.txt"]),
        (["--export", "/proc/x/runs.csv"], ["--export /proc/x/runs.csv"]),
        (["--results", "missing.csv"], ["--results missing.csv"]),
        (["--metric", "f1"], ["--metric f1", "test/accuracy"]),
        (["--fctor", "model"], ["--fctor"]),
    ],
)
def test_a_mistake_is_one_message(run_compare: Compare, two_models: str, arguments: list[str], parts: list[str]) -> None:
    status, _, error = run_compare(*arguments, "--tracking-uri", two_models)
    assert status
    assert all(part in error for part in parts)


def test_a_table_gives_the_answer_of_the_store(
    run_compare: Compare, two_models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table, options = tmp_path / "runs.csv", ("--factor", "model", "--baseline", "plain_cnn", "--margin", "0.1")
    _, from_store, _ = run_compare(*options, "--export", "runs.csv", "--tracking-uri", two_models)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, from_table, _ = run_compare("--results", "runs.csv", *options)
    assert status == 0, "a table needs no store"
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
        "override:seed": without("override:seed"),
        "param:precision": without("param:precision"),
        "digest:test": without("digest:test"),
        "metric:test/accuracy in line 3": without("metric:test/accuracy", 3),
        "param:precision in line 2": without("param:precision", 2),
        "sweep, job": "a,b\n1,2\n",
        "line 14": "".join([*lines, lines[1]]),  # a run twice
        "metric:test/accuracy=inf": lines[0] + ",".join(cells),
        "no run": lines[0],
    }
    for part, content in damaged.items():
        (tmp_path / "bad.csv").write_text(content)
        status, _, error = run_compare("--results", "bad.csv", *options)
        assert status == 1
        assert "bad.csv" in error
        assert part in error


def test_several_sweeps_are_compared_together(run_compare: Compare, store: str) -> None:
    one_seed = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=1)
    assert "'seed=range(0,5)'" in run_compare(one_seed)[2], "one seed is too few"
    first = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=3)
    second = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=5)
    status, shown, _ = run_compare(first, second[:8], "--factor", "model")
    assert status == 0
    assert "2 of 5 seeds were added" in shown
    assert "duplicated: plain_cnn seed=0" in shown
    answers = {MlflowClient(store).get_run(sweep).data.tags["answer"] for sweep in (first, second)}
    assert len(answers) == 1


OUTCOMES = [
    "",
    "{",
    "[]",
    "{}",
    '{"history": null, "mistakes": [], "split": "test"}',
    '{"history": [], "mistakes": [[1]], "split": 1}',
]
OUTCOMES += [
    '{"history": [], "mistakes": [[0, 10, -1]], "split": "test"}',
    '{"history": [[1e999, {}]], "mistakes": [], "split": ""}',
]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_invalid_outcome_is_counted_not_drawn(outcome: str) -> None:
    assert parse_outcome(outcome.encode()) is None


def test_foreign_and_broken_stores_get_a_message(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "$a_$", "[8,16]"), seeds=2, factor="model.name")
    files = Path(MlflowClient(store).get_run(sweep).info.artifact_uri.removeprefix("file://"))
    for child in MlflowClient(store).search_runs(["1"], f"tags.sweep_id = '{sweep}'")[:2]:
        Path(child.info.artifact_uri.removeprefix("file://"), "outcome.json").write_text('{"history": 1}')
    unreadable = Path(child.info.artifact_uri.removeprefix("file://"), "outcome.json")
    unreadable.unlink()
    (unreadable / "folder").mkdir(parents=True)
    status, shown, _ = run_compare("--baseline", "[8,16]")
    assert status == 0, "an arm's name is the typed text, not a formula"
    assert "against model.name=[8,16]" in shown
    assert "2 runs have no readable" in report_of(store, sweep, tmp_path)
    (files / "report.html").unlink()
    (files / "report.html").mkdir()
    status, shown, error = run_compare()
    assert (status, "In test/accuracy, against" in shown) == (1, True), "the answer is shown before it is stored"
    assert "report.html" in error
    for broken in ("", "{}", "[1]"):
        MlflowClient(store).set_tag(sweep, "grids", broken)
        assert "grids" in run_compare()[2]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
def test_the_report_reads_on_a_phone_and_prints(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name")
    assert run_compare("--baseline", "plain_cnn")[0] == 0
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
