"""A team's server, as docs/team.md describes: MLflow with accounts, on PostgreSQL; who is denied access reads one message."""

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import Call, CommandLine, free_port, wait_for_server
from kill_and_resume import MEASURED
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image, ImageDraw
from processes import SECRET, SHORT, begin

from mnist_exp import compare, evaluate, predict, run, runs, ui
from mnist_exp.paths import HOME
from mnist_exp.tracking.connection import connect

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=Path("no postgres"))
OWNER = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
EPOCHS = 15


def test_the_compose_file_starts_a_server_with_accounts_on_its_database() -> None:
    text = (HOME / "docs" / "compose.yaml").read_text()
    composed = yaml.safe_load(text)
    database, server = composed["services"]["database"], composed["services"]["server"]
    assert "--app-name basic-auth" in server["command"]
    auth = configparser.ConfigParser()
    auth.read_string(composed["configs"]["auth"]["content"])
    assert auth["mlflow"]["default_permission"] == "EDIT"
    assert auth["mlflow"]["database_uri"] == server["environment"]["MLFLOW_BACKEND_STORE_URI"]
    for service in (database, server):
        for name, value in service["environment"].items():
            assert not re.search("PASSWORD|SECRET", name) or re.fullmatch(r"\$\{[A-Z_]+:\?\}", value), "never in the file"
        named = {volume.partition(":")[0] for volume in service["volumes"]}
        assert named <= composed["volumes"].keys(), "it outlives the container"


class TeamServer:
    """MLflow's server with accounts.

    Args:
        folder: Where its artifacts and its settings are.
        database: The address of the database of the runs.
        accounts: That of the database of the accounts.
        permission: What a user may do who is not the administrator.
    """

    def __init__(self, folder: Path, database: str, accounts: str, permission: str) -> None:
        port, settings = free_port(), {"default_permission": permission, "database_uri": accounts, "admin_username": "admin"}
        self.address, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        (folder / "auth.ini").write_text("[mlflow]\nauth_cache_ttl_seconds = 60\n" + "\n".join(map(" = ".join, settings.items())))
        self.environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        workers = "2" if database.startswith("postgresql") else "1"
        self.command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--app-name",
            "basic-auth",
            "--port",
            str(port),
            "--workers",
            workers,
        ]

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        wait_for_server(f"{self.address}/health", self.process, seconds=120)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def administrate(self, request: str, method: str = "POST", **values: str) -> None:
        """Send a request about an account as the administrator."""
        passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
        passwords.add_password(None, self.address, "admin", SECRET, is_authenticated=True)
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
        url, body = f"{self.address}/api/2.0/mlflow/users/{request}", json.dumps(values).encode()
        opener.open(urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method), timeout=30)


def account(server: TeamServer, user: str, password: str = SECRET) -> dict[str, str]:
    """The variables that a teammate sets."""
    return {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


def log_in(monkeypatch: pytest.MonkeyPatch, server: TeamServer, user: str, password: str = SECRET) -> None:
    for name, value in account(server, user, password).items():
        monkeypatch.setenv(name, value)


def search(experiment: str, query: str = "") -> list[Run]:
    """The runs of an experiment of the server that the environment names, the newest first."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], query)) if found else []


def need_accounts() -> None:
    if not find_spec("flask_wtf"):
        pytest.skip("accounts need the packages of pip install -e '.[server]'")


@contextmanager
def on_sqlite(folder: Path, template_database: Path, permission: str) -> Iterator[TeamServer]:
    """A server with the teammate anna."""
    need_accounts()
    shutil.copyfile(template_database, folder / "runs.db")
    server = TeamServer(folder, f"sqlite:///{folder}/runs.db", f"sqlite:///{folder}/accounts.db", permission)
    server.start()
    server.administrate("create", username="anna", password=SECRET)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def readable(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    """A server on which only the administrator may write, with an experiment."""
    with (
        on_sqlite(tmp_path_factory.mktemp("readable"), template_database, "READ") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        log_in(patch, server, "admin")
        connect(server.address, "mnist_exp")
        yield server


@pytest.fixture(scope="module")
def editable(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    """A server on which teammates may write."""
    with on_sqlite(tmp_path_factory.mktemp("editable"), template_database, "EDIT") as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (run.main, SHORT),
        (run.main, ("-m", *SHORT, "seed=0,1")),
        (run.main, ("-m", "sweep.resume=latest")),
        (runs.main, ("list",)),
        (runs.main, ("delete", "abcdef")),
        (runs.main, ("promote", "--run", "abcdef", "--name", "digits")),
        (compare.main, ()),
        (evaluate.main, ("latest", "--data", "digits")),
        (predict.main, ("--model", "models:/digits@champion", "digit.png")),
        (ui.main, ()),
    ],
)
def test_a_wrong_password_is_answered_with_the_variables_that_hold_it(
    command: Callable[[], None], arguments: tuple[str, ...], call: Call, readable, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28)).save("digit.png")
    for user, password in (("anna", "a wrong password"), ("nobody", SECRET)):
        log_in(monkeypatch, readable, user, password)
        done = call(command, *arguments, *(["tracking.patience=3600"] if command is run.main else []))
        assert done.returncode == 1
        for part in (readable.address, f"'{user}'", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            assert part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert password not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["run", "sweep"])
def test_who_may_only_read_reads_what_was_refused_and_whom_to_ask(
    sweep: tuple[str, ...], in_process: CommandLine, readable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, readable, "anna")
    done = in_process(*sweep, *SHORT, "tracking.patience=3600")
    assert done.returncode == 1
    for part in (readable.address, "'anna'", "runs/create", "EDIT"):
        assert part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "outputs").rglob("*.pt"))


@pytest.mark.slow
def test_jobs_do_not_wait_for_a_server_that_does_not_accept_their_password(editable, tmp_path: Path, monkeypatch) -> None:
    more = ("-m", "seed=range(0,3)", "hydra.launcher.processes=1", "tracking.patience=3600")
    log_in(monkeypatch, editable, "anna")
    process = begin(editable.address, tmp_path, 40, more=more)
    editable.administrate("update-password", "PATCH", username="anna", password=f"{SECRET}{SECRET}")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "MLFLOW_TRACKING_PASSWORD" in error
    assert "Traceback" not in error
    log_in(monkeypatch, editable, "anna", SECRET + SECRET)
    command = [sys.executable, "-m", "mnist_exp.run", "-m", "sweep.resume=latest", f"output_dir={tmp_path}/outputs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(item.info.status for item in search("mnist_exp")) == ["FINISHED"] * 4


@contextmanager
def without_tags(address: str) -> Iterator[tuple[str, list[str]]]:
    """A server that passes everything on to another but tags of experiments, which it denies; its address, and what it denied."""
    denied: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "set-experiment-tag" in self.path:
                denied.append(body.decode())
                self.reply(403, b"Permission denied")
                return
            headers = {key: value for key, value in self.headers.items() if key in ("Authorization", "Content-Type")}
            request = urllib.request.Request(address + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60) as passed:
                    self.reply(passed.status, passed.read())
            except urllib.error.HTTPError as error:
                self.reply(error.code, error.read())

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer  # noqa: N815 -- the names that http.server calls

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", denied
        server.shutdown()


@pytest.mark.slow
def test_a_server_that_denies_the_saved_views_is_asked_once(
    in_process: CommandLine, command_line: CommandLine, call: Call, editable, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, editable, "admin")
    with without_tags(editable.address) as (address, denied):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        recipe = (*SHORT, "phases.finetune.epochs=1", "tracking.experiment=untagged")
        for _ in range(2):
            done = in_process(*recipe)
            assert (done.returncode, done.stderr) == (0, "")
        assert len(denied) == 1
        done = command_line("-m", "model=se_cnn,plain_cnn", "seed=0,1", *recipe)
        assert done.returncode == 0, done.stderr
        done = call(compare.main, "latest", "--experiment", "untagged")
        assert done.returncode == 0, done.stderr
    found = MlflowClient(editable.address).get_experiment_by_name("untagged")
    assert not any(name.startswith("mlflow.") for name in found.tags)


class Postgres:
    """A database server of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        (folder / "password").write_text(SECRET)
        for path in (folder, folder / "password"):
            shutil.chown(path, OWNER) if OWNER else None
        command = [POSTGRES.with_name("initdb"), "-D", folder / "data", "-U", "mlflow", "-A", "scram-sha-256"]
        command += ["--pwfile", folder / "password", "--locale", "C.UTF-8"]
        subprocess.run(command, user=OWNER, cwd=folder, check=True, capture_output=True)
        self.address = f"postgresql+psycopg://mlflow:{SECRET}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [
            POSTGRES,
            "-D",
            self.folder / "data",
            "-k",
            self.folder,
            "-p",
            str(self.port),
            "-c",
            "listen_addresses=127.0.0.1",
        ]
        ready = [POSTGRES.with_name("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + 60
        self.process = subprocess.Popen(command, user=OWNER, cwd=self.folder, stderr=subprocess.DEVNULL)
        while subprocess.run(ready, check=False).returncode:
            assert time.monotonic() < deadline
            if self.process.poll() is not None:  # after a kill, until the last process of before has ended
                self.process = subprocess.Popen(command, user=OWNER, cwd=self.folder, stderr=subprocess.DEVNULL)
            time.sleep(0.5)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TeamServer, Postgres]]:
    """A server on PostgreSQL, which one database of keeps runs and accounts, with the teammates anna and ben."""
    if not (POSTGRES.exists() and find_spec("psycopg")):
        pytest.skip("needs Debian's package postgresql, and psycopg of pip install -e '.[server]'")
    need_accounts()
    with tempfile.TemporaryDirectory() as folder:  # not in pytest's, which is closed to the owner of the database
        database = Postgres(Path(folder))
        database.start()
        server = TeamServer(tmp_path_factory.mktemp("team"), database.address, database.address, "EDIT")
        server.start()
        for user in ("anna", "ben"):
            server.administrate("create", username=user, password=SECRET)
        yield server, database
        server.kill()
        database.process.send_signal(signal.SIGINT)  # a fast shutdown
        database.process.wait(timeout=60)


def wait_for_an_epoch(process: subprocess.Popen[str], experiment: str) -> None:
    """Wait until a run that goes on has recorded metrics."""
    while not any(item.data.metrics for item in search(experiment, "attributes.status = 'RUNNING'")):
        assert process.poll() is None
        time.sleep(0.2)


def histories(experiment: str, sweep_id: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The points of the finished jobs of a sweep, by number and metric, without what depends on the machine's load."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    children = search(experiment, f"tags.sweep_id = '{sweep_id}' and attributes.status = 'FINISHED'")
    return {
        child.data.tags["job_num"]: {
            key: sorted((point.step, point.value) for point in client.get_metric_history(child.info.run_id, key))
            for key in child.data.metrics
            if not key.startswith(MEASURED)
        }
        for child in children
    }


@pytest.mark.slow
def test_a_team_works_on_one_server(team, command_line: CommandLine, call: Call, tmp_path: Path, monkeypatch) -> None:
    server, _ = team
    recipe = (*SHORT, "phases.finetune.epochs=1")
    together = threading.Barrier(8)

    def one_run(seed: int) -> subprocess.CompletedProcess[str]:
        together.wait()
        return command_line(*recipe, f"seed={seed}", **account(server, "anna"))

    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(one_run, range(8)):
            assert (done.returncode, done.stderr) == (0, "")
    log_in(monkeypatch, server, "ben")  # who has not created the experiment, and may not delete anna's runs, nor his own
    eight = search("mnist_exp")
    assert [item.info.status for item in eight] == ["FINISHED"] * 8
    assert sorted(item.data.params["seed"] for item in eight) == [str(seed) for seed in range(8)]
    for item in eight:
        assert {file.path for file in MlflowClient(server.address).list_artifacts(item.info.run_id)} >= {
            "checkpoint.pt",
            "config.yaml",
        }

    # One job fails at each attempt; its run has no checkpoint, and is followed by another one.
    sweep = ("-m", *recipe, "phases.finetune.optimizer.lr=0.001,0.002,1e29", "seed=0,1")
    for overrides in (sweep, ("-m", "sweep.resume=latest")):
        done = command_line(*overrides)
        assert done.returncode == 1
        assert "2 of 6 jobs did not finish" in done.stderr
        assert "Traceback" not in done.stderr

    process = begin(server.address, tmp_path, 30, more=("tracking.experiment=resumed",))
    wait_for_an_epoch(process, "resumed")
    process.kill()
    process.communicate()
    done = command_line("resume=latest", "tracking.experiment=resumed")
    assert done.returncode == 0, done.stderr

    picture = Image.new("L", (28, 28))
    ImageDraw.Draw(picture).line((14, 4, 14, 24), fill=255, width=3)
    picture.save(tmp_path / "digit.png")
    output = ("--output-dir", str(tmp_path / "outputs"))
    for command, arguments in (
        (compare.main, ("latest",)),
        (runs.main, ("promote", "--run", eight[0].info.run_id, "--name", "digits")),
        (predict.main, ("--model", "models:/digits@champion", str(tmp_path / "digit.png"))),
    ):
        done = call(command, *arguments, *output)
        assert done.returncode == 0, done.stderr
    assert call(runs.main, "delete", eight[0].info.run_id, *output).returncode == 1
    assert "MANAGE" in call(runs.main, "delete", eight[1].info.run_id, *output).stderr


@pytest.mark.slow
def test_a_database_and_a_server_that_are_killed_cost_a_sweep_nothing(
    team, command_line: CommandLine, tmp_path: Path, monkeypatch
) -> None:
    server, database = team
    log_in(monkeypatch, server, "ben")
    jobs = ("-m", "model=se_cnn,plain_cnn", "seed=0,1", "tracking.experiment=killed")
    done = command_line(*jobs, *SHORT, f"phases.finetune.epochs={EPOCHS}")
    assert done.returncode == 0, done.stderr
    process = begin(server.address, tmp_path, EPOCHS, more=jobs)
    wait_for_an_epoch(process, "killed")
    database.kill()
    server.kill()
    time.sleep(10)
    database.start()
    server.start()
    _, error = process.communicate(timeout=300)
    assert "Traceback" not in error
    if process.returncode:
        done = command_line("-m", "sweep.resume=latest", "tracking.experiment=killed")
        assert done.returncode == 0, done.stderr
    disturbed, undisturbed = search("killed", "tags.sweep_jobs LIKE '%'")
    assert disturbed.info.status == "FINISHED"
    found, expected = (histories("killed", sweep.info.run_id) for sweep in (disturbed, undisturbed))
    assert sorted(expected) == ["0", "1", "2", "3"]
    assert found == expected
