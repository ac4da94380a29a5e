"""The MLflow UI in a real browser, at 1400x900: each page is opened by its link and searched for its content."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.compare import make_sweep
from conftest import CommandLine, chromium, free_port, one_split, wait_for_server
from matplotlib.figure import Figure
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mnist_exp.api import frame
from mnist_exp.experiment.summary import describe_run
from mnist_exp.tracking.base import COLORS, RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore

CHROMIUM = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the UI is looked at in chromium, which is not installed"),
]
HOSTILE = "<img src=x onerror=\"document.title='it ran'\"><script>document.title='it ran'</script>"
COMMAND = "python -m mnist_exp.run -m hydra/sweeper=optuna data=mnist_tuning output_dir=/tmp/x"
ARMS = ("se_cnn", "plain_cnn", "plain_cnn_matched")
TIMEOUT = 60_000  # ms

Ui = Callable[..., dict[str, str]]
Open = Callable[[str], Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open a page with the profile of a first visit; a screenshot of its end is left in tmp_path."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    page = context.new_page()

    def go(link: str) -> Page:
        page.goto(link)
        return page

    yield go
    page.screenshot(path=tmp_path / "page.png")
    context.close()


@pytest.fixture
def ui(store: str) -> Iterator[Ui]:
    """Start `python -m mnist_exp.ui ARGUMENTS`, and return the links that it prints by name, in their order."""
    servers = []

    def start(*arguments: str) -> dict[str, str]:
        port = free_port()
        command = [sys.executable, "-m", "mnist_exp.ui", *arguments, "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        servers.append(server)
        assert server.stdout is not None
        links = {}
        while "Ctrl-C" not in (line := server.stdout.readline()):
            name, _, link = line.strip().rpartition(": ")
            links[name] = link
        wait_for_server(f"http://127.0.0.1:{port}/health", server)
        return links

    yield start
    for server in servers:
        server.terminate()
        assert server.wait() == 143  # 128 + SIGTERM


@pytest.fixture
def single(store: str) -> str:
    """The id of a single run with pictures, whose description contains HTML."""
    tags = {"overrides": "seed=7", "data": "mnist", "recipe": "se_cnn 12345678", "objective": "val/accuracy"}
    with MLflowStore(store, "mnist_exp").start(RunInfo("se_cnn mnist seed=7", COMMAND, tags)) as tracker:
        tracker.log_params({"model": "se_cnn", "seed": 7})
        tracker.log_dataset(one_split(), "test", "test")
        tracker.log_figure(Figure(), "pictures/worst_mistakes.png")
        tracker.set_description(describe_run({}, [f"output_dir={HOSTILE}"], HOSTILE, "x"))
        for step in range(3):
            tracker.log_metrics({"train/loss": 1 / (1 + step), "val/accuracy": 0.9 + step / 100}, 20_000 * step)
        tracker.log_results({"test/accuracy": 0.9876, "test/loss": 0.0432, "model/parameters": 19_674})
    return tracker.run_id


def first(links: dict[str, str]) -> str:
    return next(iter(links.values()))


def test_the_leaderboard_has_a_row_per_recipe_the_best_mean_first(ui: Ui, visit: Open, store: str) -> None:
    sweep = make_sweep(store, ARMS, seeds=3)
    page = visit(first(ui("--view", "leaderboard")))
    means = frame(sweep).groupby("model")["val/accuracy"].mean().sort_values(ascending=False)
    expect(page.get_by_text("Group:").first).to_be_visible()
    groups = [text.split()[1] for text in page.get_by_text(re.compile(r"^Group: ")).all_inner_texts()]
    assert [*dict.fromkeys(groups)] == list(means.index)
    for text in (f"{means.iloc[0]:.6f}"[:6], "se_cnn seed=1"):
        expect(page.get_by_text(re.compile(f"^{text}")).first).to_be_visible()
    headers = {name.strip() for name in page.get_by_role("columnheader").all_inner_texts()}
    assert {"val/accuracy", "test/accuracy", "model/parameters"} <= headers
    assert page.locator("[data-assistant-ui=true]:has-text('Assistant')").count() == 0


def test_html_in_a_description_does_not_run(ui: Ui, single: str, visit: Open) -> None:
    page = visit(first(ui(single)))
    expect(page.get_by_text("Repeat it").first).to_be_visible()
    assert page.title() != "it ran"


def test_the_page_of_a_run_shows_its_command_whole_and_its_data_as_an_array(ui: Ui, single: str, visit: Open) -> None:
    page = visit(first(ui(single)))
    expect(page.get_by_text(COMMAND, exact=True).first).to_be_visible()
    page.get_by_text("mnist-test").first.click()
    expect(page.get_by_text("Array Datasource").first).to_be_visible()


def test_a_second_ui_prints_the_link_and_ends(ui: Ui, single: str) -> None:
    port = re.search(r":(\d+)/", first(ui()))[1]
    command = [sys.executable, "-m", "mnist_exp.ui", single[:8], "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert single in done.stdout.splitlines()[0]
    done = subprocess.run([*command[:3], "nonsense", "--port", port], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nonsense" in done.stderr


def drawn(page: Page) -> dict[str, list[dict]]:
    """The data and the colors of the drawn charts, by title."""
    page.locator(".js-plotly-plot").first.wait_for()
    page.wait_for_timeout(3000)  # for the histories of the metrics
    script = """plots => plots.map(plot => plot.data.map(trace => (
        {type: trace.type, x: Array.from(trace.x || []), y: Array.from(trace.y || []),
         color: (trace.line || {}).color || (trace.marker || {}).color})))"""
    charts = page.locator(".js-plotly-plot").evaluate_all(script)
    return {str(number): traces for number, traces in enumerate(charts)}


def test_the_curves_of_a_few_runs_have_the_colors_of_their_arms(ui: Ui, visit: Open, store: str) -> None:
    sweep = make_sweep(store, ARMS, seeds=3)
    page = visit(first(ui(sweep, "--view", "curves")))
    expect(page.get_by_text("model vs. test/accuracy").first).to_be_visible()
    points, losses, *_ = drawn(page).values()
    assert {trace["type"] for trace in points} == {"scatter"}
    assert sorted({value for trace in points for value in trace["x"]}) == sorted(ARMS)
    assert sorted(value for trace in points for value in trace["y"]) == pytest.approx(sorted(frame(sweep)["test/accuracy"]))
    curves = [trace for trace in losses if len(trace["x"]) == 40]
    assert {curve["color"][:7] for curve in curves} == set(COLORS[: len(ARMS)])


def test_the_curves_of_many_runs_are_means_over_the_loaded_runs_of_each_arm(ui: Ui, visit: Open, store: str) -> None:
    sweep = make_sweep(store, ARMS, seeds=100)
    page = visit(first(ui(sweep, "--view", "curves")))
    expect(page.get_by_text("mean of the first 100 of 300 runs").first).to_be_attached()
    table = frame(sweep)  # the UI loads them in the order of the seeds as text
    table = table.assign(text=table["seed"].astype(str)).sort_values("text", kind="stable").iloc[:100]
    expected = sorted(table.groupby("model")["val/accuracy"].mean())
    _, accuracies, *_ = drawn(page).values()
    curves = [trace for trace in accuracies if len(trace["x"]) == 2]
    ends = sorted({round(curve["y"][-1], 9) for curve in curves})
    assert ends == pytest.approx(expected, abs=1e-4), "which seeds are at the edge depends on the store"


def follow(page: Page, name: str) -> Page:
    """The page behind a link of a description, which opens in a new tab."""
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=name, exact=True).click()
    return opened.value


@pytest.fixture
def stored(store: str, command_line: CommandLine) -> dict[str, str]:
    """A compared sweep, a run that has failed, and a promoted model; the id of the failed run."""
    done = command_line("-m", f"model={','.join(ARMS)}", "seed=range(0,3)", "data=digits", "data.subset=512", "phase=[train]")
    assert done.returncode == 0, done.stderr
    for words in (
        ["compare", "latest", "--factor", "model", "--baseline", "plain_cnn"],
        ["runs", "promote", "--run", frame()["run"][0], "--name", "digits"],
    ):
        subprocess.run([sys.executable, "-m", f"mnist_exp.{words[0]}", *words[1:]], check=True, capture_output=True)
    done = command_line("data=digits", "~phases.train", "phases.finetune.optimizer.lr=1e30")
    assert done.returncode == 1, done.stdout
    (failed,) = [run for run in MLflowStore(store, "mnist_exp").runs() if run.status == "FAILED"]
    return {"failed": failed.run_id, "error": failed.tags["error"]}


def test_every_question_takes_a_click_or_two_from_a_printed_link(ui: Ui, visit: Open, store: str, stored: dict[str, str]) -> None:
    links = ui()
    table = frame()

    (answer,) = [link for name, link in links.items() if name.startswith("Answer: ")]  # one click: the answer
    page = visit(answer)
    expect(page.get_by_text("test/accuracy, against model=plain_cnn").first).to_be_visible()
    picture = page.locator("img[src*='compare-model.png']")
    expect(picture).to_be_attached()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    page = follow(page, "Report")
    expect(page.frame_locator("iframe").get_by_text("Reproduce").first).to_be_attached()

    page = visit(links["Report"])
    expect(page.frame_locator("iframe").get_by_text("Reproduce").first).to_be_attached()

    page = visit(links["Curves"])  # one click: the curves
    expect(page.get_by_text("model vs. test/accuracy").first).to_be_visible()

    page = visit(links["Leaderboard: digits_512 by val/accuracy"])  # two clicks: the best model
    means = table.groupby("model")["val/accuracy"].mean()
    group = page.get_by_text(re.compile("^Group: ")).first
    expect(group).to_be_visible()
    assert means[group.inner_text().split()[1]] == means.max()

    page = visit(links["Failed"])  # one click: the reason of a failure
    expect(page.get_by_text(stored["error"]).first).to_be_visible()
    page = visit(first(ui(stored["failed"])))
    expect(page.get_by_text(stored["error"]).first).to_be_visible()
    page = follow(page, "Traceback")
    expect(page.get_by_text("DivergedError").first).to_be_visible()

    page = visit(links["Registered models"])
    page.get_by_role("button", name="Try it now").click()  # a dialog of MLflow, which greets a new browser
    page.get_by_role("link", name="digits").first.click()
    expect(page.get_by_text("champion").first).to_be_visible()
    expect(page.get_by_text(f"{table['test/accuracy'][0]:.2%}".replace("%", " %")).first).to_be_visible()

    page = visit(links["Sweeps"])
    expect(page.get_by_text("9 of 9").first).to_be_visible()

    diff = [sys.executable, "-m", "mnist_exp.runs", "diff", table["run"][0], table["run"][1]]  # one click: the difference
    printed = subprocess.run(diff, check=True, capture_output=True, text=True).stdout
    path = re.search(r"http://[^/]+(/\S+)", printed)[1]
    page = visit(re.match(r"http://[^/]+", answer)[0] + path)
    expect(page.get_by_text("Comparing 2 Runs").first).to_be_visible()
