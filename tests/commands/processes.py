"""Commands in processes of their own, servers and disks that fail, and defaults of a user, for the tests of commands."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from mnist_exp.overrides import quoted
from mnist_exp.paths import CONF

SHORT = ("data=digits", "~phases.train")
SECRET = uuid4().hex  # not written here, or the uncommitted changes could hold it


def begin(address: str, tmp_path: Path, epochs: int, *, more: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start a run, or a sweep, against the store and wait until a run has reported its first epoch."""
    recipe = [*more, *SHORT, f"phases.finetune.epochs={epochs}"]
    command = [sys.executable, "-m", "mnist_exp.run", *recipe, f"output_dir={quoted(str(tmp_path / 'outputs'))}"]
    environment |= {"MLFLOW_TRACKING_URI": address}
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    client = MlflowClient(address)
    while not any(run.data.metrics for run in client.search_runs([e.experiment_id for e in client.search_experiments()])):
        assert process.poll() is None
        time.sleep(0.2)
    return process


def assert_complete(address: str, epochs: int) -> None:
    """The one run has finished, with every point of every epoch once."""
    client = MlflowClient(address)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    points = sorted(client.get_metric_history(run.info.run_id, "epoch"), key=lambda point: point.step)
    assert [round(point.value * 10) for point in points] == list(range(1, 10 * epochs + 1))
    assert len({output.model_id for output in run.outputs.model_outputs}) == 1
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"checkpoint.pt", "config.yaml", "pictures"}


def assert_sweep_complete(address: str, jobs: int) -> None:
    """The parent and all jobs have finished, and no trace of an error is left."""
    runs = MlflowClient(address).search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"] * (jobs + 1)
    assert not any("error" in run.data.tags for run in runs)


def shell(command: str) -> str:
    """Type a command that was printed, which must succeed; return what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_nowhere(secret: str, folder: Path, *texts: str) -> None:
    """The secret is in none of the files in `folder` and in none of the texts."""
    holders = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holders == []
    assert not any(secret in text for text in texts)


@contextmanager
def broken_server(*, with_experiment: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A server that answers 500, except, if wanted, to who asks for an experiment; its address, and the credentials it got."""
    seen: list[str] = []

    class Broken(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(self.headers.get("Authorization", ""))
            known = with_experiment and "experiments/get" in self.path
            body = json.dumps({"experiment": {"experiment_id": "1", "name": "mnist_exp", "lifecycle_stage": "active"}}).encode()
            self.send_response(200 if known else 500)
            self.end_headers()
            self.wfile.write(body if known else b"Internal Server Error")

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 -- the names that http.server calls

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    """A file system of its own in `folder`; yields a function that fills what is left of it with the file `filler`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of one's own takes root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)

    def fill() -> None:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def local_defaults(content: str) -> Iterator[str]:
    """A file in conf/local/ for MNIST_EXP_LOCAL; its name."""
    file = CONF / "local" / f"test_{uuid4().hex}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"# @package _global_\n{content}\n")
    try:
        yield file.stem
    finally:
        file.unlink()
        if not list(file.parent.iterdir()):
            file.parent.rmdir()
