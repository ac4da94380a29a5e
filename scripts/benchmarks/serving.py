"""Time a trained model at work: requests per second of `mlflow models serve`, and the answers of the drawing page.

    python scripts/benchmarks/serving.py [--seconds 10] [--rounds 3] [--strokes 50]

The script promotes an untrained network in a store of its own, which is as fast as a trained one. Clients are threads of one
process, each with one connection, on the same machine as the server. The drawing page is opened in Chromium; a stroke is timed
from the release of the mouse to the shown answer.
"""

import argparse
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import sync_playwright

from mnist_exp.composing import compose_recipe
from mnist_exp.nodes import build
from mnist_exp.settings import DataDescription
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore

CLIENTS, SIZES = (1, 8), (1, 100)
AIM = 100  # ms from a stroke to its answer


def promote_model(folder: Path) -> None:
    """Register an untrained network as mnist@champion in a new store, which the commands then use."""
    os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder / 'mlflow.db'}"
    data = DataDescription(class_names=list("0123456789"), side=28, channels=1, preparation="handwriting")
    settings = compose_recipe().settings.model_copy(update={"data_description": data})
    store = MLflowStore(uri, "mnist_exp")
    store.open()
    with store.start(RunInfo("se_cnn", "", {})) as tracker:
        tracker.log_model("se_cnn", build(settings.model, "model", **data.shape), settings, {}, folder / "model")
    store.register(store.get_run(tracker.run_id), "mnist", "champion", "For the benchmark.", {})


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[int]:
    """Run a server of Python's module until the block ends; yield its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as server:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                raise SystemExit(f"{' '.join(command)} has ended")
            time.sleep(0.2)
        try:
            yield port
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def count_requests(port: int, body: bytes, until: float) -> int:
    """Send a request after the other until a time; return their number."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    count = 0
    while time.monotonic() < until:
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"the server answers {response.status}")
        count += 1
    return count


def measure_server(port: int, seconds: float, rounds: int) -> None:
    """Print requests per second by images per request and number of clients: median (min to max) over rounds."""
    for size in SIZES:
        images = np.random.default_rng(0).integers(0, 256, (size, 1, 28, 28), np.uint8)
        body = json.dumps({"inputs": images.tolist()}).encode()
        count_requests(port, body, time.monotonic() + 2)  # warm up
        for clients in CLIENTS:
            rates = []
            for _ in range(rounds):
                until = time.monotonic() + seconds
                with ThreadPoolExecutor(clients) as pool:
                    counts = pool.map(count_requests, *zip(*[(port, body, until)] * clients, strict=True))
                    rates.append(sum(counts) / seconds)
            print(f"{size} images a request, {clients} clients: {spread(rates)} requests/s")


def measure_page(port: int, strokes: int) -> None:
    """Print the milliseconds from the end of a stroke to the shown answer: median (min to max)."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        box = page.locator("#paper").bounding_box()
        assert box is not None
        times = []
        for number in range(strokes + 3):
            page.mouse.move(box["x"] + 100 + number, box["y"] + 60)
            page.mouse.down()
            page.mouse.move(box["x"] + 130 + number, box["y"] + 200, steps=5)
            page.wait_for_timeout(400)  # answers during the stroke are over
            page.evaluate("delete document.body.dataset.milliseconds")
            page.mouse.up()
            page.wait_for_selector("body[data-milliseconds]")
            times.append(float(page.evaluate("document.body.dataset.milliseconds")))
            page.get_by_role("button", name="Clear").click()
        browser.close()
    slow = sum(milliseconds > AIM for milliseconds in times[3:])
    print(f"drawing page, {strokes} strokes: {spread(times[3:])} ms, {slow} longer than {AIM} ms")


def spread(values: Sequence[float]) -> str:
    """Return the median, and the extremes."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strokes", type=int, default=50)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        promote_model(Path(folder))
        with serving(["mlflow", "models", "serve", "-m", "models:/mnist@champion", "--env-manager", "local"]) as port:
            measure_server(port, arguments.seconds, arguments.rounds)
        with serving(["mnist_exp.draw", "--model", "models:/mnist@champion"]) as port:
            measure_page(port, arguments.strokes)


if __name__ == "__main__":
    main()
