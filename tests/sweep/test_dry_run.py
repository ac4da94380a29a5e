from pathlib import Path

import pytest
from conftest import CommandLine
from mlflow import MlflowClient

JOBS = ("-m", "data=digits", "~phases.train", "model=se_cnn,plain_cnn", "seed=0,1")


def test_a_dry_run_shows_the_jobs_and_records_nothing(
    in_process: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/untouched.db")
    done = in_process(*JOBS, "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    for part in ("4 jobs", "model=plain_cnn seed=1", "Nothing was recorded"):
        assert part in " ".join(done.stdout.split())
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_a_bad_job(in_process: CommandLine, store: str) -> None:
    assert "batch_size=0 is invalid" in in_process(*JOBS, "batch_size=64,0", "sweep.dry_run=true").stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.subset=600,5000", "data.subset=5000 is invalid: expected at most 1408"),
        ("phases.finetune.split=finetune,other", "phases.finetune.split=other is invalid: expected train or finetune"),
        ("phases.finetune.batch_size=128,99999", "phases.finetune.batch_size=99999 is invalid: expected at most 1200"),
        ("model.hidden_features=80,8000", "parameters: at most 25,000 are allowed"),
    ],
)
def test_a_value_that_does_not_fit_the_images_is_refused_before_the_first_job(
    in_process: CommandLine, store: str, override: str, message: str
) -> None:
    done = in_process(*JOBS, override, "sweep.dry_run=true")
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_a_dry_run_of_a_resume_shows_what_is_skipped_and_how_long_the_rest_takes(command_line: CommandLine, store: str) -> None:
    failing = ("phases.finetune.optimizer.lr=0.001,1e29",)
    assert command_line("-m", *JOBS[1:3], *failing).returncode == 1
    before = [(run.info.run_id, run.info.status, run.data.tags) for run in MlflowClient(store).search_runs(["1"])]
    done = command_line("-m", "sweep.resume=latest", "sweep.dry_run=true")
    shown = " ".join(done.stdout.split())
    assert "2 jobs, 1 to run." in shown
    assert "skip: finished" in shown
    assert "the median of 1 earlier runs" in shown
    assert [(run.info.run_id, run.info.status, run.data.tags) for run in MlflowClient(store).search_runs(["1"])] == before
