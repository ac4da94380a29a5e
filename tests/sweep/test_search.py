import re
import signal
from pathlib import Path

import pytest
from conftest import CommandLine
from mlflow import MlflowClient
from test_sweep import begin, parent_and_children

from mnist_exp.sweep.search import make_pruning_callback, open_study


def test_another_process_can_continue_a_trial(tmp_path: Path) -> None:
    """`make_pruning_callback` depends on a private attribute of Optuna's frozen trials."""
    pytest.importorskip("optuna")
    study = open_study(tmp_path, seed=0, objective="val/accuracy")
    trials = [study.ask() for _ in range(8)]
    verdicts = []
    for trial in trials:
        should_prune = make_pruning_callback(tmp_path, trial.number, "val/accuracy")
        assert not should_prune(50, {"train/loss": 1.0})
        verdicts.append(should_prune(100, {"val/accuracy": 1 - trial.number / 10}))
        study.tell(trial.number, 1 - trial.number / 10)
    assert not verdicts[0]
    assert verdicts[-1], "below the median of the others at the same step"
    assert study.trials[-1].intermediate_values == {100: pytest.approx(0.3)}


@pytest.mark.slow
def test_one_worker_repeats_a_search_and_its_answer_is_on_the_parent(command_line: CommandLine, store: str) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "data=digits", "data.subset=600", "phase=[train]", "objective=val/loss")
    space = (
        "optimizer.lr=tag(log,interval(0.01,1))",
        "batch_size=choice(32,64)",
        "hydra.sweeper.n_trials=4",
        "hydra.launcher.processes=1",
    )
    for _ in range(2):
        done = command_line(*search, *space)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    runs = client.search_runs(["1"], order_by=["attributes.start_time"])
    first, second = (run for run in runs if "sweep_jobs" in run.data.tags)
    jobs = {
        sweep.info.run_id: [run for run in runs if run.data.tags.get("sweep_id") == sweep.info.run_id]
        for sweep in (first, second)
    }
    tried = [[job.data.tags["overrides"] for job in jobs[sweep.info.run_id]] for sweep in (first, second)]
    assert len(set(tried[0])) == 4
    assert tried[0] == tried[1]
    best = min(jobs[first.info.run_id], key=lambda job: job.data.metrics["val/loss"])
    assert f"job {best.data.tags['job_num']}" in first.data.tags["answer"]
    page = Path(client.download_artifacts(first.info.run_id, "compare-search.html")).read_text()
    for job in jobs[first.info.run_id]:
        assert re.search(r"optimizer.lr=(\S+)", job.data.tags["overrides"])[1] in page


@pytest.mark.slow
def test_a_stopped_search_learns_from_every_job_when_it_is_resumed(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "data=digits", "data.subset=600", "phase=[train]", "phases.train.epochs=40")
    space = ("batch_size=64", "optimizer.lr=tag(log,interval(0.01,0.2))", "hydra.sweeper.n_trials=4")
    process = begin(store, tmp_path, *search, *space, "hydra.launcher.processes=2", jobs=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    done = command_line(*search[:2], "sweep.resume=latest", "hydra.launcher.processes=1")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    study = open_study(tmp_path / "outputs" / parent.info.run_id, seed=0, objective="val/accuracy")
    assert [child.metrics["val/accuracy"] for child in children] == [trial.value for trial in study.trials]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
