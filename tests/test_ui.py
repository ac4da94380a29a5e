import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from mnist_exp import ROOT
from mnist_exp.run import description
from mnist_exp.tracking import MLflowTracker, run_path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the UI is looked at in chromium, which is not installed"),
]


HOSTILE = "<img src=x onerror=\"document.title='it ran'\"><script>document.title='it ran'</script>"


@pytest.fixture
def ui(store: str) -> Iterator[str]:
    """`scripts/ui` on a store with one run: the link that it prints."""
    with MLflowTracker(store, "mnist_exp").start("se_cnn mnist seed=7", {"overrides": "seed=7"}) as tracker:
        tracker.tags({"mlflow.note.content": description({}, [f"output_dir={HOSTILE}"], HOSTILE)})
        tracker.metrics({"test/accuracy": 0.9876, "test/loss": 0.0432, "model/parameters": 19_674}, step=60_000)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "ui"), "--port", str(port)]
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


def test_html_in_a_description_does_not_run(ui: str, store: str, tmp_path: Path) -> None:
    (run,) = MlflowClient(store).search_runs(["1"])
    shown = page(f"{ui.split('#')[0]}{run_path(MlflowClient(store), run.info.run_id)}", tmp_path)
    assert "Repeat it" in shown
    assert "it ran</title>" in page(f"data:text/html,{quote(HOSTILE)}", tmp_path), "it would have been seen"
    assert "it ran</title>" not in shown


def test_a_run_that_is_not_there_has_no_page(store: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "ui"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no run nonsense" in done.stderr
