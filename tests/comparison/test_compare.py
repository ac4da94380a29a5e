"""The command: from a sweep in the store to the answer in the terminal and the report in MLflow and in a browser."""

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
from mnist_exp.comparison.history import parse_history
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


def report_of(store: str, sweep: str, folder: Path, factor: str = "model") -> str:
    return Path(MlflowClient(store).download_artifacts(sweep, f"compare-{factor}.html", str(folder))).read_text()


def tags(store: str, sweep: str) -> dict[str, str]:
    return MlflowClient(store).get_run(sweep).data.tags


def test_the_answer_is_printed_and_the_report_published_in_the_parent(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name", better=0.002)
    status, shown, _ = run_compare("latest", "--factor", "model.name", "--baseline", "plain_cnn")
    assert status == 0
    title = "se_cnn is higher than plain_cnn by more than the margin"
    assert shown.startswith(title)
    assert shown.index(title) < shown.index("difference (95 %)") < shown.index("Report: ") < shown.index("mnist_exp.ui")
    found = tags(store, sweep)
    assert title in found["answer"]
    assert found["answer.model.name"].startswith(found["answer"])
    assert "A pair (n) is" in found["answer.model.name"], "with the notes"
    note = found["mlflow.note.content"]
    assert title in note.splitlines()[0]
    assert f"](get-artifact?path=compare-model.name.png&run_uuid={sweep})" in note
    assert not {"test/accuracy", "val/accuracy"} & MlflowClient(store).get_run(sweep).data.metrics.keys()
    page = report_of(store, sweep, tmp_path, "model.name")
    parts = ("Differences", "Every run", "Learning curves", "Mistakes", "Configuration differences", "Reproduce")
    assert all(f"<h2>{part}</h2>" in page for part in parts)
    assert page.index("<h1>") < page.index("difference (95 %)") < page.index("<li>") < page.index("<h2>Differences")
    assert "train.setting" not in page, "parameters that are the same in all arms are not shown"
    assert page.count("</svg>\n</figure>") == page.count("<figure ") == 4
    assert page.count("<title>plain_cnn, seed 0, run ") == 1, "a tooltip for each run"
    assert ">difference in test/accuracy" in page, "text is text"
    assert "run:" not in page
    assert f"{sweep} --factor model.name --baseline plain_cnn" in page
    assert HOSTILE not in page, "a model's name is text, not HTML"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", page), "the file is self-contained"


def test_two_keys_give_two_answers_that_do_not_overwrite_each_other(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=3, batch_size="128,256,512")
    status, shown, _ = run_compare()
    assert status == 0
    assert "against model=se_cnn" in shown
    assert "against batch_size=128" in shown
    found = tags(store, sweep)
    assert {"answer.model", "answer.batch_size"} <= found.keys()
    assert [f"**{factor}**" in found["mlflow.note.content"] for factor in ("model", "batch_size")] == [True, True]
    curve = report_of(store, sweep, tmp_path, "batch_size")
    assert "<h2>Curve</h2>" in curve
    assert curve.count("model=plain_cnn") > 0, "a line for each model"
    before = found["answer.batch_size"], curve
    assert run_compare("--factor", "model", "--metric", "test/loss")[0] == 0
    after = tags(store, sweep)
    assert "batch_size" not in after["answer"], "the last one"
    assert (after["answer.batch_size"], report_of(store, sweep, tmp_path, "batch_size")) == before
    assert after["mlflow.note.content"].count("**model**") == 1, "a new answer replaces that of the same factor"
    assert run_compare("--baseline", "plain_cnn")[1].count("against model=plain_cnn") == 1


def test_the_next_step_is_a_command_that_runs(run_compare: Compare, store: str) -> None:
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=3, better=0.0)
    shown = run_compare()[1]
    assert f"sweep.extend={sweep} 'seed=range(3,5)'" in shown
    assert f"mnist_exp.ui {sweep}" in shown
    clear = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=5, better=0.01)
    assert run_compare()[1].endswith(f"Next: python -m mnist_exp.runs best {clear}")
    client = MlflowClient(store)
    (job, *_) = client.search_runs(["1"], f"tags.sweep_id = '{clear}'")
    client.set_terminated(job.info.run_id, "KILLED")
    client.set_tag(clear, "mlflow.source.name", "python -m mnist_exp.run -m hydra/launcher=slurm hydra.x=1 model=se_cnn")
    assert run_compare()[1].endswith(f"Next: python -m mnist_exp.run -m hydra/launcher=slurm sweep.resume={clear}")
    one = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=1)
    status, shown, _ = run_compare(one)
    assert (status, "1 more pair needed for an interval" in shown) == (0, True)


def test_a_key_that_cannot_be_compared_leaves_the_answers_of_the_others(run_compare: Compare, store: str) -> None:
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=2, batch_size="128,256")
    for child in MlflowClient(store).search_runs(["1"], f"tags.sweep_id = '{sweep}'"):
        if "256" in child.data.tags["overrides"]:
            MlflowClient(store).set_tag(child.info.run_id, "data", "other")
    status, shown, _ = run_compare()
    assert (status, "against model=se_cnn" in shown) == (0, True)
    assert "batch_size is not compared: The runs differ in data" in shown


def test_a_long_answer_leaves_the_rest_of_the_description(run_compare: Compare, store: str) -> None:
    sizes = ",".join(map(str, range(100, 140)))
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=1, batch_size=sizes)
    for child in MlflowClient(store).search_runs(["1"], f"tags.sweep_id = '{sweep}'")[::2]:
        MlflowClient(store).set_terminated(child.info.run_id, "FAILED")
    for _ in range(2):
        assert run_compare("--factor", "model")[0] == 0
    note = tags(store, sweep)["mlflow.note.content"]
    assert (note.count("**model**"), "| job | name |" in note) == (1, True)
    assert len(tags(store, sweep)["answer.model"]) > 1500, "the tag has all notes"


def test_a_search_is_ranked_not_compared(run_compare: Compare, store: str) -> None:
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=2)
    MlflowClient(store).set_tag(sweep, "sweeper", "optuna")
    status, _, error = run_compare()
    assert (status, f"mnist_exp.runs best {sweep}" in error) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["0" * 32], ["0" * 32]),
        (["last"], ["last"]),
        (["latest", "x"], ["x"]),
        (["--factor", "optimizer"], ["--factor optimizer", "model"]),
        (["--baseline", "resnet"], ["--baseline resnet", "model"]),
        (["--factor", "model", "--baseline", "resnet"], ["--baseline resnet", "plain_cnn, se_cnn"]),
        (["--margin", "0"], ["--margin", "'0'"]),
        (["--pairs", "some"], ["--pairs", "all"]),
        (["--export", "runs.txt"], ["--export", "runs.txt"]),
        (["--export", "/proc/x/runs.csv"], ["--export", "/proc/x/runs.csv"]),
        (["--results", "missing.csv"], ["--results missing.csv"]),
        (["--metric", "f1"], ["--metric f1", "test/accuracy"]),
        (["--metric", "test/loss", "--images"], ["--metric test/loss", "accuracy"]),
        (["--images"], ["--images", "same images"]),
        (["--report", "report.pdf"], ["--report", "report.pdf"]),
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
    options = ("--factor", "model", "--baseline", "plain_cnn", "--margin", "0.1")
    _, from_store, _ = run_compare(*options, "--export", "runs.csv", "--tracking-uri", two_models)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, from_table, _ = run_compare("--results", "runs.csv", *options)
    assert status == 0, "a table needs no store"
    assert from_store.startswith(from_table), "the same numbers and notes; only the report is missing"
    assert "margin 0.10 points" in from_table


def test_a_report_is_of_one_comparison(run_compare: Compare, tmp_path: Path) -> None:
    table, report = tmp_path / "runs.csv", tmp_path / "report.html"
    table.write_text("model,width,seed,test/accuracy\na,1,0,0.9\nb,1,0,0.91\na,2,0,0.92\nb,2,0,0.93\n")
    status, shown, error = run_compare("--results", str(table), "--report", str(report))
    assert (status, shown, report.exists()) == (1, "", False)
    assert "--factor" in error
    status, shown, _ = run_compare("--results", str(table), "--report", str(report), "--factor", "width")
    assert status == 0
    assert f"--results {table} --factor width --baseline 1" in report.read_text()
    assert "precision" in shown, "the table lacks this column"
    assert "precision" in report.read_text()


def test_several_sweeps_are_compared_together(run_compare: Compare, store: str) -> None:
    first = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=3)
    second = make_sweep(store, ("plain_cnn", "se_cnn"), seeds=5)
    status, shown, _ = run_compare(first, second[:8], "--factor", "model")
    assert status == 0
    assert "1 row and 2 looks" in shown
    assert "6 runs with the same settings and seed" in shown
    assert tags(store, first)["answer"] == tags(store, second)["answer"]


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
    assert parse_history(outcome.encode()) is None


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
    assert "which the figures omit: 2" in report_of(store, sweep, tmp_path, "model.name")
    (files / "compare-model.name.html").unlink()
    (files / "compare-model.name.html").mkdir()
    status, shown, error = run_compare()
    assert (status, "test/accuracy, against" in shown) == (1, True), "the answer is shown before it is stored"
    assert "compare-model.name.html" in error
    for broken in ("", "{}", "[1]"):
        MlflowClient(store).set_tag(sweep, "grids", broken)
        assert "grids" in run_compare()[2]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="chromium is not installed")
def test_the_report_reads_on_a_phone_and_prints(run_compare: Compare, store: str, tmp_path: Path) -> None:
    sweep = make_sweep(store, ("plain_cnn", "se_cnn", quoted(f"se{HOSTILE}")), seeds=5, factor="model.name")
    assert run_compare("--baseline", "plain_cnn")[0] == 0
    page = report_of(store, sweep, tmp_path, "model.name")
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
