"""What people put in: their own pictures, optimizers, losses, phases. One file each, and every command works with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, CommandLine
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from mnist_exp import compare, evaluate, predict, runs
from mnist_exp.api import load
from mnist_exp.learning.data import Dataset
from mnist_exp.run import main
from mnist_exp.settings import DataDescription

CLASSES = ("cat", "dog", "owl")
QUICK = ("data.side=20", "batch_size=32", "phases.train.epochs=2", "phase=[train]", "model=plain_cnn")


def draw(folder: Path, count: int, seed: int, channels: int = 3) -> None:
    """Write pictures with a bright third, FOLDER/CLASS/NUMBER.png: left, middle or right."""
    pixels = np.random.default_rng(seed).integers(0, 60, (count, 20, 20, channels), np.uint8)
    for number, image in enumerate(pixels):
        label = number % 3
        image[:, label * 7 : label * 7 + 6] += 150
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if channels == 3 else image[:, :, 0]).save(folder / CLASSES[label] / f"{number}.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw(tmp_path / "animals", 330, seed=0)
    draw(tmp_path / "new", 30, seed=1)
    return tmp_path / "animals"


def test_own_pictures_in_color_train_predict_resume_and_repeat(
    in_process: CommandLine, call: Call, pictures: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process("data=folder", f"data.root={pictures}", "data.channels=3", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "mnist_exp.draw" not in done.stdout, "nobody draws photos"
    (run,) = MlflowClient(store).search_runs(["1"])
    assert run.data.metrics["test/accuracy"] > 0.9
    # Files are prepared as those of the training data were.
    done = call(predict.main, str(tmp_path / "new"), "--out", str(tmp_path / "out.csv"))
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    assert len(rows) == 30
    assert sum(Path(file).parent.name == label for file, label, *_ in rows) >= 28
    assert set(load().prepare([tmp_path / "new" / "owl" / "2.png"]).shape) == {1, 20, 3}
    # The recorded folder is found again, and class names are everywhere.
    evaluated = call(evaluate.main, "--data", "folder", "--data-root", str(pictures))
    assert evaluated.returncode == 1, "its images are gray, those of the model are not"
    repeated = in_process(f"rerun='{run.info.run_id}'")
    assert repeated.returncode == 0, repeated.stderr
    assert "identical" in repeated.stdout
    (tmp_path / "outputs" / run.info.run_id / "finished").unlink()
    monkeypatch.setenv("MNIST_ROOT", "/proc/nowhere")
    resumed = in_process("resume=latest")
    assert resumed.returncode == 0, resumed.stderr
    # A folder that has moved is named on the command line.
    pictures.rename(tmp_path / "moved")
    lost = in_process(f"rerun='{run.info.run_id}'")
    assert lost.returncode == 1
    assert f"data.root={pictures}" in lost.stderr
    found = in_process(f"rerun='{run.info.run_id}'", f"data.root={tmp_path / 'moved'}")
    assert found.returncode == 0, found.stderr


def test_a_sweep_on_own_pictures_shows_the_mistakes(
    in_process: CommandLine, call: Call, pictures: Path, store: str, tmp_path: Path
) -> None:
    names = ("animals", "others")
    draw(tmp_path / "others", 330, seed=5)
    for name in names:
        option = tmp_path / "options" / "data" / f"{name}.yaml"
        option.parent.mkdir(parents=True, exist_ok=True)
        option.write_text(f"defaults:\n  - folder\n  - _self_\nroot: {tmp_path / name}\nchannels: 3\nside: 20\n")
    folder = ("--config-dir", str(tmp_path / "options"))
    both = in_process(*folder, "-m", "data=animals,others", *QUICK[1:], "sweep.dry_run=true")
    assert "2 jobs" in both.stdout, "options that differ in their place alone are two data sets"
    jobs = ("data=animals", "optimizer.lr=0.001,0.2", "seed=0,1", "hydra/launcher=basic", *QUICK[1:])
    done = in_process("--config-dir", str(tmp_path / "options"), "-m", *jobs)
    assert done.returncode == 0, done.stderr
    compared = call(compare.main, "--config-dir", str(tmp_path / "options"))
    assert compared.returncode == 0, compared.stderr
    parent = next(run for run in MlflowClient(store).search_runs(["1"]) if "grids" in run.data.tags)
    file = MlflowClient(store).download_artifacts(parent.info.run_id, "compare-optimizer.lr.html")
    assert "owl" in Path(file).read_text()


def test_a_search_without_validation_is_refused(refuse: Callable[..., str]) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "data=digits", "phase=[finetune]", "phases.finetune.optimizer.lr=interval(0.1,0.4)")
    assert "val/accuracy" in refuse(*search)


def test_a_search_never_scores_test_images(in_process: CommandLine, store: str, call: Call) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra/launcher=basic", "objective=val/loss")
    done = in_process(
        *search, "data=digits", "data.subset=600", "phase=[train]", "batch_size=128", "optimizer.lr=interval(0.1,0.4)"
    )
    assert done.returncode == 0, done.stderr
    stored = MlflowClient(store).search_runs(["1"])
    jobs = [run for run in stored if "grids" not in run.data.tags]
    assert len(jobs) == 2
    assert not any(name.startswith("test/") for run in jobs for name in run.data.metrics)
    best = min(jobs, key=lambda run: run.data.metrics["val/loss"])
    ranked = call(runs.main, "best", "latest")
    assert ranked.stdout.splitlines()[-1].count(f"optimizer.lr={best.data.params['train.optimizer.lr']}") == 1


OPTIONS = {  # one YAML file each
    "optimizer/asgd": "_target_: torch.optim.ASGD\nlr: 0.05\n",
    "scheduler/poly": "_target_: torch.optim.lr_scheduler.PolynomialLR\ntotal_iters: 10\n",
    "scheduler/cycle": "_target_: torch.optim.lr_scheduler.OneCycleLR\nmax_lr: 0.2\n",
    "loss/margin": "_target_: torch.nn.MultiMarginLoss\nmargin: 0.5\n",
    "augmentation/twice": (
        "_target_: mnist_exp.learning.augmentation.Compose\nparts:\n"
        "  turn: {_target_: mnist_exp.learning.augmentation.RandomAffine, degrees: 20, scale: [1, 1], translate: 0}\n"
        "  shift: {_target_: mnist_exp.learning.augmentation.RandomAffine, degrees: 0, scale: [1, 1], translate: 0.2}\n"
    ),
    "phase/warmup": (
        "# @package phases.warmup\ndefaults:\n  - finetune@_here_\n  - override /callbacks@callbacks: [freeze]\n  - _self_\n"
    ),
}
CHOICES = {
    "optimizer/asgd": "optimizer=asgd",
    "scheduler/poly": "scheduler=poly",
    "scheduler/cycle": "scheduler=cycle",
    "loss/margin": "loss=margin",
    "augmentation/twice": "augmentation=twice",
    "phase/warmup": "phase=[warmup,train]",
}


@pytest.fixture
def options(tmp_path: Path) -> Callable[[str], Path]:
    """Write one of OPTIONS, or another file, and return the folder for --config-dir."""

    def write(name: str, text: str = "") -> Path:
        file = tmp_path / "options" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text or OPTIONS[name])
        return tmp_path / "options"

    return write


@pytest.mark.parametrize("name", OPTIONS)
def test_a_part_of_one_s_own_takes_one_file(
    name: str, in_process: CommandLine, options: Callable[..., Path], store: str, tmp_path: Path
) -> None:
    folder = ("--config-dir", str(options(name)))
    quick = () if name.startswith("phase") else ("phase=[train]",)
    done = in_process(*folder, "data=digits", "data.subset=1024", *quick, CHOICES[name])
    assert done.returncode == 0, done.stderr
    (run,) = MlflowClient(store).search_runs(["1"])
    assert run.data.metrics["test/loss"] < 10
    recipe = json.loads(Path(MlflowClient(store).download_artifacts(run.info.run_id, "recipe.json")).read_text())
    assert list(recipe["config"]["phases"]) == (["warmup", "train"] if name.startswith("phase") else ["train"])
    (tmp_path / "outputs" / run.info.run_id / "finished").unlink()
    resumed = in_process(*folder, "resume=latest")
    assert resumed.returncode == 0, "what started can be resumed: " + resumed.stderr


REFUSED = {
    "optimizer/lbfgs": "_target_: torch.optim.LBFGS\nlr: 0.1\n",
    "scheduler/plateau": "_target_: torch.optim.lr_scheduler.ReduceLROnPlateau\n",
    "loss/vector": "_target_: torch.nn.CrossEntropyLoss\nreduction: none\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_that_cannot_be_used_is_refused_before_training(
    name: str, refuse: Callable[..., str], options: Callable[..., Path]
) -> None:
    group, _, option = name.partition("/")
    chosen = ("--config-dir", str(options(name, REFUSED[name])), "data=digits", f"{group}={option}")
    assert group in refuse(*chosen)
    assert group in refuse("-m", *chosen, "seed=0,1"), "before the first job"


def test_callbacks_that_a_phase_cannot_use_are_refused_before_training(refuse: Callable[..., str]) -> None:
    stopping = ("data=digits", "callbacks@phases.finetune.callbacks=[early_stopping]")
    assert "phases.finetune.callbacks.early_stopping.metric" in refuse(*stopping)
    assert "phases.finetune.callbacks.early_stopping.metric" in refuse("-m", *stopping, "seed=0,1")
    assert "callbacks.freeze.modules" in refuse("data=digits", "callbacks=[freeze]", "callbacks.freeze.modules=[nothing]")


def test_a_recipe_of_an_earlier_format_is_refused_with_one_message(
    in_process: CommandLine, call: Call, store: str, tmp_path: Path
) -> None:
    """Its label smoothing stood elsewhere: a default would drop it silently."""
    assert in_process("data=digits", "~phases.train").returncode == 0
    client = MlflowClient(store)
    (run,) = client.search_runs(["1"])
    recipe = json.loads(Path(client.download_artifacts(run.info.run_id, "recipe.json")).read_text())
    del recipe["format"]
    client.log_text(run.info.run_id, json.dumps(recipe), "recipe.json")
    refused = call(main, f"rerun='{run.info.run_id}'", f"output_dir={tmp_path / 'outputs'}")
    assert refused.returncode == 1
    assert "format" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2


def test_a_run_starts_from_the_weights_of_another(in_process: CommandLine, call: Call, store: str, tmp_path: Path) -> None:
    quick = ("data=digits", "data.subset=512", "phase=[train]", "batch_size=128", "model=plain_cnn")
    client = MlflowClient(store)

    def newest() -> Run:
        return client.search_runs(["1"], order_by=["attributes.start_time DESC"])[0]

    assert in_process(*quick).returncode == 0
    first = newest()
    # It is recorded by its full id and the digest of its weights, so that it can be repeated.
    done = in_process(*quick, "init=latest")
    assert done.returncode == 0, done.stderr
    second = newest()
    losses = [client.get_metric_history(run.info.run_id, "train/loss")[0].value for run in (first, second)]
    assert losses[1] < losses[0]
    assert f"init={first.info.run_id}" in second.data.tags["overrides"].replace("'", "")
    assert "val/accuracy" in second.data.metrics, "the first run has not trained on the validation images of this seed"
    repeated = in_process(f"rerun='{second.info.run_id}'")
    assert repeated.returncode == 0, repeated.stderr
    # With another seed, the images that validate may have been trained on.
    assert in_process(*quick, f"init='{first.info.run_id[:8]}'", "seed=1").returncode == 0
    assert "val/accuracy" not in newest().data.metrics
    # Another head: what fits is taken on request.
    other = (*quick, "model.hidden_features=40", "model.parameter_limit=null")
    refused = in_process(*other, f"init='{first.info.run_id}'")
    assert refused.returncode == 1
    assert "init_strict=false" in refused.stderr
    assert in_process(*other, f"init='{first.info.run_id}'", "init_strict=false").returncode == 0
    # In a sweep, the weights are part of what identifies a job.
    swept = in_process("-m", *quick, f"init='{first.info.run_id}',null", "seed=0", "hydra/launcher=basic")
    assert swept.returncode == 0, swept.stderr
    resumed = in_process("-m", "sweep.resume=latest", "hydra/launcher=basic")
    assert resumed.returncode == 1
    assert "finished" in resumed.stderr
    assert in_process("-m", "sweep.extend=latest", "seed=1", "hydra/launcher=basic").returncode == 0


def test_a_run_starts_from_weights_in_a_file(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    """Such as those of another package. The trained model does not need the file, and a repeated run is not misled by another."""
    quick = ("data=digits", "data.subset=512", "phase=[train]", "batch_size=128", "model=plain_cnn")
    assert in_process(*quick).returncode == 0
    weights, file = load().model.state_dict(), tmp_path / "my weights.pt"
    del weights["output.bias"]
    torch.save(weights, file)
    assert "init_strict=false" in in_process(*quick, f"init='{file}'").stderr
    assert in_process(*quick, f"init='{file}'", "init_strict=false", "seed=1").returncode == 0
    client = MlflowClient(store)
    second, first = client.search_runs(["1"], order_by=["attributes.start_time DESC"])
    losses = [client.get_metric_history(run.info.run_id, "train/loss")[0].value for run in (first, second)]
    assert losses[1] < losses[0]
    assert str(file) in second.data.params["init"]
    torch.save({"output.bias": torch.zeros(10)}, file)
    assert "init" in in_process(f"rerun='{second.info.run_id}'").stderr
    file.unlink()
    assert load(second.info.run_id).data.before == [], "a file does not say what its weights were trained on"
    for content in (b"", b"no weights"):
        file.write_bytes(content)
        refused = in_process(*quick, f"init='{file}'")
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
    torch.save([1, 2], file)
    assert "weights" in in_process(*quick, f"init='{file}'").stderr


def test_weights_that_saw_the_test_images_are_refused(digits: Dataset) -> None:
    own = DataDescription(**digits.description)
    same = own.model_copy(update={"trained_on": ["train", "finetune"]})
    assert same.may_have_trained_on(own, "finetune")
    assert not same.may_have_trained_on(own, "test")
    other_split = same.model_copy(update={"digests": own.digests | {"test": "0"}})
    assert other_split.may_have_trained_on(own, "test"), "other images of the same data set"
    other_data = other_split.model_copy(update={"name": "fashion_mnist"})
    assert not other_data.may_have_trained_on(own, "test")
