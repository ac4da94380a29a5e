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
from mlflow import MlflowClient
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mnist_exp.api import frame
from mnist_exp.experiment.summary import describe_run
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.views import VERSION

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
    """Start `python -m mnist_exp.ui ARGUMENTS`, and return the links that it prints by name, the first as ''."""
    servers = []

    def start(*arguments: str) -> dict[str, str]:
        port = free_port()
        command = [sys.executable, "-m", "mnist_exp.ui", *arguments, "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        servers.append(server)
        assert server.stdout is not None
        links = {"": server.stdout.readline().strip()}
        while (line := server.stdout.readline()).startswith("  "):
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
    tags = {"overrides": "seed=7", "data": "mnist"}
    with MLflowStore(store, "mnist_exp").start(RunInfo("se_cnn mnist seed=7", COMMAND, tags)) as tracker:
        tracker.log_params({"model": "se_cnn", "seed": 7})
        tracker.log_dataset(one_split(), "test", "test")
        tracker.log_figure(Figure(), "pictures/worst_mistakes.png")
        tracker.set_description(describe_run({}, [f"output_dir={HOSTILE}"], HOSTILE, "x"))
        for step in range(3):
            tracker.log_metrics({"train/loss": 1 / (1 + step), "val/accuracy": 0.9 + step / 100}, 20_000 * step)
        tracker.log_results({"test/accuracy": 0.9876, "test/loss": 0.0432, "model/parameters": 19_674})
    return tracker.run_id


def test_the_leaderboard_shows_whole_values_and_no_assistant(ui: Ui, single: str, visit: Open) -> None:
    page = visit(ui()[""])
    for text in ("se_cnn mnist seed=7", "0.9876", "0.0432", "19674", "seed=7"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    headers = page.get_by_role("columnheader").all()
    headers = sorted((header for header in headers if header.bounding_box()), key=lambda header: header.bounding_box()["x"])
    names = [name for header in headers if "/" in (name := header.inner_text().strip()) or name in ("data", "overrides")]
    assert list(dict.fromkeys(names)) == ["test/accuracy", "test/loss", "model/parameters", "data", "overrides"]
    assert page.locator("[data-assistant-ui=true]:has-text('Assistant')").count() == 0


def test_html_in_a_description_does_not_run(ui: Ui, single: str, visit: Open) -> None:
    page = visit(ui(single)[""])
    expect(page.get_by_text("Repeat it").first).to_be_visible()
    assert page.title() != "it ran"


def test_the_page_of_a_run_shows_its_command_whole_and_its_data_as_an_array(ui: Ui, single: str, visit: Open) -> None:
    page = visit(ui(single)[""])
    expect(page.get_by_text(COMMAND, exact=True).first).to_be_visible()
    page.get_by_text("mnist-test").first.click()
    expect(page.get_by_text("Array Datasource").first).to_be_visible()


def test_a_second_ui_prints_the_link_and_ends(ui: Ui, single: str) -> None:
    link = ui()[""]
    port = re.search(r":(\d+)/", link)[1]
    command = [sys.executable, "-m", "mnist_exp.ui", single[:8], "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert single in done.stdout.splitlines()[0]
    done = subprocess.run([*command[:3], "nonsense", "--port", port], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nonsense" in done.stderr


def drawn(page: Page) -> dict[str, list[dict]]:
    """The data of the drawn charts, by title."""
    page.locator(".js-plotly-plot").first.wait_for()
    page.wait_for_timeout(3000)  # for the histories of the metrics
    script = """plots => plots.map(plot => plot.data.map(trace => (
        {type: trace.type, x: Array.from(trace.x || []), y: Array.from(trace.y || [])})))"""
    charts = page.locator(".js-plotly-plot").evaluate_all(script)
    return {str(number): traces for number, traces in enumerate(charts)}


@pytest.mark.parametrize("seeds", [5, 100])
def test_the_curves_are_means_over_the_loaded_runs_of_each_arm(ui: Ui, visit: Open, store: str, seeds: int) -> None:
    sweep = make_sweep(store, ARMS, seeds=seeds)
    page = visit(ui(sweep, "--view", "curves")[""])
    name = "mean of 15 runs" if seeds == 5 else "mean of the first 100 of 300 runs"
    expect(page.get_by_text(f"Curves by arm: sweep {sweep[:8]}, {name}").first).to_be_attached()
    bars, _, accuracies, *_ = drawn(page).values()
    assert [trace["type"] for trace in bars] == ["bar"]
    table = frame(sweep)
    if seeds > 5:  # the UI loads them in the order of the seeds as text
        table = table.assign(text=table["seed"].astype(str)).sort_values("text", kind="stable").iloc[:100]
    expected = table.groupby("model")["test/accuracy"].mean()
    shown = {label.rpartition(".")[2]: value for value, label in zip(bars[0]["x"], bars[0]["y"], strict=True)}
    assert shown.keys() == set(ARMS)
    if seeds == 5:
        assert shown == pytest.approx(expected.to_dict())
    else:
        assert shown == pytest.approx(expected.to_dict(), abs=1e-4), "which seeds are at the edge depends on the store"
    curves = [trace for trace in accuracies if len(trace["x"]) == 40]
    assert len(curves) in (len(ARMS), 2 * len(ARMS)), "a line for each arm, and its points"
    assert {curve["x"][-1] for curve in curves} == {120_000}
    means = sorted(table.groupby("model")["train/accuracy"].mean())
    ends = sorted({round(curve["y"][-1], 9) for curve in curves})
    assert ends == pytest.approx(means, abs=1e-8 if seeds == 5 else 1e-4)


def test_sweeps_and_costs_have_their_views(ui: Ui, visit: Open, store: str, single: str) -> None:
    make_sweep(store, ARMS, seeds=2)
    links = ui()
    page = visit(links["Sweeps"])
    expect(page.get_by_role("link", name="sweep model by seed")).to_be_visible()
    assert page.get_by_role("link", name="se_cnn mnist seed=7").count() == 0, "parents only"
    for name in ("sweep/jobs_finished", "sweep/jobs_failed", "sweep/best_objective"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    page = visit(links["Accuracy against cost"])
    for cost, traces in zip(("model/parameters", "time/total_seconds"), drawn(page).values(), strict=False):
        expect(page.get_by_text(f"{cost} vs. test/accuracy").first).to_be_visible()
        assert sum(len(trace["x"]) for trace in traces) >= 6


def test_every_question_takes_three_clicks_at_most(
    ui: Ui, visit: Open, store: str, command_line: CommandLine, tmp_path: Path
) -> None:
    done = command_line("-m", f"model={','.join(ARMS)}", "seed=range(0,5)", "data=digits", "~phases.train")
    assert done.returncode == 0, done.stderr
    compare = [sys.executable, "-m", "mnist_exp.compare", "latest", "--factor", "model", "--baseline", "plain_cnn"]
    subprocess.run(compare, check=True, capture_output=True)
    start = ui()[""]
    table = frame()
    best = table.loc[table["test/accuracy"].idxmax()]
    name = MlflowClient(store).get_run(best["run"]).info.run_name

    page = visit(start)  # the answer
    page.get_by_role("button", name="Leaderboard").click()
    page.get_by_test_id(f"saved-views-item-sweeps-{VERSION}").click()
    page.get_by_role("link", name="sweep model by seed").click()
    expect(page.get_by_text("test/accuracy, against model=plain_cnn").first).to_be_visible()
    picture = page.locator("img[src*='compare-model.png']")
    expect(picture).to_be_attached()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100

    page = visit(start)  # the best model and its accuracy
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_text(f"{best['test/accuracy']:.2%}".replace("%", " %")).first).to_be_visible()
    page.get_by_role("link", name=f"{best['model']}-digits").first.click()
    expect(page.get_by_text("test/accuracy").first).to_be_visible()

    page = visit(start)  # the worst mistakes of a run
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_text("Show more").first.click()
    picture = page.locator("img[src*='worst_mistakes']").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
