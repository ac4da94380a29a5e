import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from benchmarks.compare import make_sweep
from conftest import chromium
from matplotlib.figure import Figure
from mlflow import MlflowClient

from mnist_exp.experiment.summary import describe_run
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.views import run_path

CHROMIUM = chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the UI is looked at in chromium, which is not installed"),
]


HOSTILE = "<img src=x onerror=\"document.title='it ran'\"><script>document.title='it ran'</script>"


@pytest.fixture
def ui(store: str, tmp_path: Path) -> Iterator[str]:
    """`python -m mnist_exp.ui` on a store with one run: the link that it prints."""
    picture = tmp_path / "confusion_matrix.png"
    Figure().savefig(picture)
    with MLflowStore(store, "mnist_exp").start(RunInfo("se_cnn mnist seed=7", "", {"overrides": "seed=7"})) as tracker:
        tracker.log_file(picture, "pictures")
        tracker.set_description(describe_run({}, [f"output_dir={HOSTILE}"], HOSTILE))
        tracker.log_metrics({"test/accuracy": 0.9876, "test/loss": 0.0432, "model/parameters": 19_674}, step=60_000)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mnist_exp.ui", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            link = server.stdout.readline().strip()
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.5)
            yield link
        finally:
            server.terminate()


def page(link: str, folder: Path) -> str:
    """Return the page behind `link` as chromium renders it."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--window-size=1600,1000", f"--user-data-dir={folder}/profile"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=20000", "--dump-dom", link]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ).stdout


def test_the_printed_link_opens_on_the_leaderboard(ui: str, tmp_path: Path) -> None:
    shown = page(ui, tmp_path)
    for part in ("se_cnn mnist seed=7", "test/accuracy", "0.9876", "0.0432", "19674", "overrides", "seed=7"):
        assert part in shown, f"{part} is not in the leaderboard"


def test_a_sweep_reads_well(ui: str, store: str, tmp_path: Path) -> None:
    parent = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=2)
    subprocess.run([sys.executable, "-m", "mnist_exp.compare", f"sweep={parent}"], check=True, capture_output=True)
    table = page(ui, tmp_path)
    names = [f"{arm} seed={seed}" for arm in ("se_cnn", "plain_cnn") for seed in (0, 1)]
    for part in ("sweep model by seed", "test/accuracy", "model/parameters", *names):
        assert part in table, f"{part} is not in the leaderboard"
    charts = page(f"{ui}&compareRunsMode=CHART", tmp_path)
    for part in ("Search metric charts", "test", "train", "model", 'class="main-svg"'):
        assert part in charts, f"{part} is not among the charts"
    front, client = ui.split("#")[0], MlflowClient(store)
    overview = page(f"{front}{run_path('1', parent)}", tmp_path)
    for part in ("Answer", "In test/accuracy, against model=se_cnn", "4 jobs: 4 FINISHED", "Child runs", *names):
        assert part in overview, f"{part} is not on the parent's page"
    (single,) = client.search_runs(["1"], "tags.overrides = 'seed=7'")
    path = run_path("1", single.info.run_id).split("?")[0]
    artifact = page(f"{front}{path}/artifacts/pictures/confusion_matrix.png", tmp_path)
    assert "confusion_matrix.png" in artifact
    assert re.search(r"<img[^>]*(blob:|get-artifact)[^>]*>", artifact), re.findall(r"<img[^>]*>", artifact)


def test_html_in_a_description_does_not_run(ui: str, store: str, tmp_path: Path) -> None:
    (run,) = MlflowClient(store).search_runs(["1"])
    shown = page(f"{ui.split('#')[0]}{run_path('1', run.info.run_id)}", tmp_path)
    assert "Repeat it" in shown
    assert "it ran</title>" in page(f"data:text/html,{quote(HOSTILE)}", tmp_path), "it would have been seen"
    assert "it ran</title>" not in shown


def test_a_run_that_is_not_there_has_no_page(store: str) -> None:
    command = [sys.executable, "-m", "mnist_exp.ui", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no run nonsense" in done.stderr
