"""All jobs are checked before the first starts."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import CommandLine

JOBS = ("-m", "data=digits", "~phases.train", "model=se_cnn,plain_cnn", "seed=0,1")


def test_a_dry_run_shows_the_jobs_and_records_nothing(
    in_process: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/untouched.db")
    done = in_process(*JOBS, "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert all(f"model={model} seed={seed}" in shown for model in ("se_cnn", "plain_cnn") for seed in (0, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("seed", range(299), "-1"),
        ("batch_size", [64], "0"),
        ("optimizer.lr", [0.1], "-0.1"),
        ("model.se.reduction", range(1, 16), "17"),
        ("model.hidden_features", range(10, 80, 5), "8000"),  # too many parameters
        ("phases.finetune.optimizer.betas", ["[0.9,0.99]", "[0.8,0.9]"], "[0.9]"),
        ("data.subset", [600], "5000"),  # does not fit the images, nor do these
        ("phases.finetune.split", ["finetune"], "other"),
        ("phases.finetune.batch_size", [128], "99999"),
    ],
)
def test_a_mistake_in_the_last_job_is_found_before_the_first(
    refuse: Callable[..., str], key: str, good: Sequence[object], bad: str
) -> None:
    phases = () if key.startswith("optimizer") else ("~phases.train",)
    answer = refuse("-m", "data=digits", *phases, f"{key}={','.join(map(str, good))},{bad}")
    assert f"{key.rpartition('.')[2]}={bad}" in answer or "parameter_limit" in answer


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.extend=zz"],
        ["sweep.extend=latest", "sweep.resume=latest"],
        ["optimizer.lr=interval(0.1,0.2)"],
        ["hydra.launcher.processes=0"],
        ["output_dir=/tmp/a,/tmp/b"],  # no record of a job has its locations
        ["data.root=/tmp/a,/tmp/b", "data=folder"],
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(refuse: Callable[..., str], overrides: list[str]) -> None:
    answer = refuse(*JOBS, *overrides)
    assert overrides[0].partition("=")[0] in answer


@pytest.mark.parametrize(
    ("choice", "package"),
    [("hydra/launcher=ray_cluster", "ray"), ("hydra/launcher=slurm", "submitit"), ("hydra/sweeper=optuna", "optuna")],
)
def test_a_missing_package_is_found_before_the_sweep_is_recorded(
    refuse: Callable[..., str], choice: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install" in refuse(*JOBS, choice)


@pytest.mark.parametrize("override", ["sweep.resume=latest", "sweep.dry_run=true"])
def test_without_m_the_keys_of_a_sweep_are_refused(refuse: Callable[..., str], override: str) -> None:
    assert "-m" in refuse(override)
    assert override in refuse(override)


def test_a_sweep_that_is_not_there(in_process: CommandLine, store: str) -> None:
    done = in_process("-m", "sweep.resume=latest")
    assert done.returncode == 1
    assert store in done.stderr


@pytest.mark.parametrize("missing", ["root", "download_root"])
def test_the_head_of_a_cluster_needs_no_images(
    refuse: Callable[..., str], in_process: CommandLine, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    nowhere = (f"data.{missing}=/proc/nowhere", "data.fallback=null", "~phases.train")
    assert "/proc/nowhere" in refuse(*nowhere), "a run needs them"
    done = in_process("-m", *nowhere, "seed=0,1", "sweep.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "-1" in refuse("-m", *nowhere, "seed=0,-1"), "all else is checked"
