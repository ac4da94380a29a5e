"""A run that was interrupted is resumed, by the command that it printed, as if it had not been."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Call
from mlflow import MlflowClient
from processes import SHORT, begin, shell

from mnist_exp.api import train
from mnist_exp.overrides import quoted
from mnist_exp.paths import CHECKOUT
from mnist_exp.run import main
from mnist_exp.storage import checkpoint, run_dir


@pytest.fixture(scope="module")
def trained(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; its store is next to the folder of all runs."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copyfile(template_database, folder / "mlflow.db")
    locations = (f"output_dir={folder}/outputs", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    return folder / "outputs" / train(*SHORT, "optimizer=adam", "+optimizer.eps=1e-7", *locations).run_id


@pytest.fixture
def unfinished(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of which only the end is missing, in the store that MLFLOW_TRACKING_URI points to."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained.parent.parent}/mlflow.db")
    (trained / run_dir.FINISHED).unlink(missing_ok=True)
    return trained


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder.parent.parent}/mlflow.db")


def test_one_process_resumes_a_run_and_completes_its_model(call: Call, unfinished: Path) -> None:
    client = client_of(unfinished)
    (pending,) = client.search_logged_models(["1"])
    client.finalize_logged_model(pending.model_id, "PENDING")  # as a kill leaves a model that is half recorded
    with run_dir.lock_run(unfinished):
        done = call(main, "resume=latest", f"output_dir={unfinished.parent}")
    assert done.returncode == 1
    assert unfinished.name in done.stderr
    assert call(main, f"resume='{unfinished.name[:6]}'", f"output_dir={unfinished.parent}").returncode == 0
    run = client.get_run(unfinished.name)
    assert run.info.status == "FINISHED"
    (model,) = client.search_logged_models(["1"])
    assert (model.model_id, model.status) == (pending.model_id, "READY")
    assert len(run.outputs.model_outputs) == 1


def test_a_resumed_run_says_which_from_where_and_whether_the_software_changed(call: Call, unfinished: Path) -> None:
    saved = checkpoint.load(unfinished / run_dir.CHECKPOINT)
    checkpoint.save(unfinished, replace(saved, software=saved.software | {"torch": "1.0"}, elapsed=saved.elapsed + 1000))
    done = call(main, "resume=latest", f"output_dir={unfinished.parent}")
    assert done.returncode == 0, done.stderr
    for word in (unfinished.name, f"step {saved.state['steps']}", "1,200", "torch was 1.0"):
        assert word in done.stdout
    run = client_of(unfinished).get_run(unfinished.name)
    assert "1,200 examples; torch was 1.0" in run.data.tags["resumed"]
    assert run.data.metrics["time/total_seconds"] > 1000, "the seconds before the resume count"


def test_a_deleted_run_is_to_be_restored(call: Call, unfinished: Path) -> None:
    client_of(unfinished).delete_run(unfinished.name)
    done = call(main, "resume=latest", f"output_dir={unfinished.parent}")
    client_of(unfinished).restore_run(unfinished.name)
    assert done.returncode == 1
    assert f"mlflow runs restore --run-id {unfinished.name}" in done.stderr


def test_a_resumed_run_keeps_its_own_recipe(call: Call, unfinished: Path) -> None:
    done = call(main, "resume=latest", "optimizer=adam", "seed=3", f"output_dir={unfinished.parent}")
    assert done.returncode == 1
    assert "optimizer=adam seed=3" in done.stderr


def test_a_stored_configuration_with_a_foreign_target_is_refused(call: Call, unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / unfinished.name
    shutil.copytree(unfinished, folder)
    saved = checkpoint.load(folder / run_dir.CHECKPOINT)
    settings = saved.recipe.settings.model_copy(update={"model": saved.recipe.settings.model | {"_target_": "antigravity.main"}})
    checkpoint.save(folder, replace(saved, recipe=replace(saved.recipe, settings=settings)))
    (folder / run_dir.PREVIOUS_CHECKPOINT).unlink()
    done = call(main, "resume=latest", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "model._target_=antigravity.main" in done.stderr
    assert "antigravity" not in sys.modules


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been() -> None:
    """Five kills; `scripts/stress/kill_and_resume.py` makes fifty."""
    done = subprocess.run(
        [sys.executable, CHECKOUT / "scripts" / "stress" / "kill_and_resume.py", "--kills", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["run", "sweep"])
def test_the_printed_command_resumes(
    signum: signal.Signals, sweep: tuple[str, ...], template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed into a shell, in another folder and without the environment of the first."""
    folder = tmp_path / "a b's"
    folder.mkdir()
    shutil.copyfile(template_database, folder / "mlflow.db")
    address = f"sqlite:///{folder}/mlflow.db"
    process = begin(address, folder, epochs=60, more=(*sweep, f"tracking.uri={quoted(address)}"))
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert signum.name in error
    assert "Traceback" not in error
    before = {run.info.run_id: run for run in MlflowClient(address).search_runs(["1"])}
    jobs = [run for run in before.values() if "sweep_jobs" not in run.data.tags]
    assert {run.info.status for run in jobs} == {"KILLED"}
    assert all(signum.name in run.data.tags["error"] for run in jobs)
    assert any("train/loss" in run.data.metrics for run in jobs), "what was reported before is kept"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (command,) = re.findall("`([^`]+)`", error)
    shown = shell(command)
    for run in MlflowClient(address).search_runs(["1"]):
        assert run.info.status == "FINISHED"
        assert "error" not in run.data.tags
        for key in ("mlflow.source.name", "overrides"):
            assert run.data.tags[key] == before.get(run.info.run_id, run).data.tags[key], "runs that had started keep theirs"
    assert "mnist_exp.ui" in shown
