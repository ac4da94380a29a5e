"""The promoted model behind `mlflow models serve`."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call, free_port, wait_for_server
from PIL import Image, ImageDraw

from mnist_exp import runs
from mnist_exp.api import load

pytestmark = pytest.mark.slow
MODELS = Path(__file__).parents[2] / "docs" / "models.md"
CURL = """curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \
-d "$(python -c 'import json; print(json.dumps({"inputs": [[[[0] * 28] * 28]]}))')\""""


@pytest.fixture
def address(call: Call, stored_run: str) -> Iterator[str]:
    """The server of a promoted model, as docs/models.md starts it."""
    done = call(runs.main, "promote", "--run", stored_run, "--name", "mnist")
    assert done.returncode == 0, done.stderr
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/mnist@champion", "--env-manager", "local"]
    with subprocess.Popen(
        [*command, "--port", str(port)], env=os.environ, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        wait_for_server(f"http://127.0.0.1:{port}/ping", server)
        yield f"http://127.0.0.1:{port}/invocations"
        os.killpg(server.pid, signal.SIGTERM)  # it starts a process of its own


def test_the_documented_requests_are_answered(address: str, tmp_path: Path) -> None:
    """The docs' `mlflow models serve -m models:/mnist@champion --env-manager local --port 5001` answers at another port here."""
    done = subprocess.run(
        ["bash", "-c", CURL.replace("http://127.0.0.1:5001/invocations", address)], capture_output=True, text=True, check=True
    )
    assert len(json.loads(done.stdout)["predictions"][0]) == 10
    picture = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(picture).line([(50, 20), (50, 80)], fill=0, width=8)
    picture.save(tmp_path / "photo.jpg")
    (snippet,) = [block for block in re.findall(r"^```python\n(.*?)^```$", MODELS.read_text(), re.M | re.S) if "post(" in block]
    snippet = snippet.replace("http://127.0.0.1:5001/invocations", address)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\d\]", done.stdout.splitlines()[-1])


def post(address: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_server_says_what_the_classifier_says(address: str) -> None:
    classifier = load("models:/mnist@champion")
    random = np.random.default_rng(0)
    for count in (1, 7, 1000):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        status, answer = post(address, {"inputs": images[:, None].tolist()})
        assert status == 200, answer
        logits = np.array(answer["predictions"])
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        expected = classifier.classify(images)
        np.testing.assert_allclose(exponentials / exponentials.sum(1, keepdims=True), expected.probabilities, atol=1e-5)
        if count == 7:
            seven = images
    shapes = [seven.tolist(), seven[:, None, :, :27].tolist(), [[1, 2, 3]]]
    for body in (*({"inputs": images} for images in shapes), {"inputs": [[[["a"] * 28] * 28]]}, {"images": []}, "text"):
        status, answer = post(address, body)
        assert status == 400
        assert "Traceback" not in answer["message"]
    status, answer = post(address, {"inputs": seven[:, None].tolist()})
    assert status == 200, "it goes on"
