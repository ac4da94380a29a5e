"""Every command, link, example and file that README.md and docs/ name is real."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image, ImageDraw

from mnist_exp import CONF, metrics
from mnist_exp.compare import check as check_comparison
from mnist_exp.config import as_dict, bind, build, resolve
from mnist_exp.errors import UserError
from mnist_exp.learning import augmentation, datasets, evaluation, models, optim
from mnist_exp.learning.datasets import MNIST_SHAPE
from mnist_exp.learning.training import fit, prepare_phases
from mnist_exp.overrides import parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = {"RUN_ID": "a" * 32, "TEACHER_1": "b" * 32, "TEACHER_2": "c" * 32}  # placeholders in commands

CI = "run by .ci/run"
RUN = "run by the test below, each in less than a minute"
COMPOSED = "too long: composed and validated below"
BELOW = "tests/docs/test_documentation.py"
PARSED = "too long: the options are looked up below"
# Every command of a bash block, and the check that it gets: one of the above, the test that runs it, or the reason for none.
COMMANDS = {
    "pip install -e . && python -m mnist_exp.run": CI,
    "pip install -e '.[dev]' && pytest -n 2 --dist loadfile": CI,
    "python -m mnist_exp.run -m experiment=quick": CI,
    "python -m mnist_exp.compare sweep=latest factor=model baseline=plain_cnn": CI,
    "ruff format --check . && ruff check . && mypy": CI,
    "pytest -m slow -n 2 --dist worksteal": CI,
    "pytest -m cluster": CI,
    "python -m mnist_exp.run --help": RUN,
    "python -m mnist_exp.run optimizer=adam batch_size=256": RUN,
    "python -m mnist_exp.run '~phases.finetune' phases.train.epochs=3": RUN,
    "python -m mnist_exp.run data=mnist_tuning": RUN,
    "python -m mnist_exp.run +phase@phases.polish=finetune": RUN,
    "python -m mnist_exp.run optimizer@phases.finetune.optimizer=adamw": RUN,
    "python -m mnist_exp.run -m model=se_cnn,plain_cnn 'seed=range(0,3)'": RUN,
    "python -m mnist_exp.runs list": RUN,
    "python -m mnist_exp.runs reap": RUN,
    "python -m mnist_exp.runs list --sort test/accuracy --data mnist --last 20": RUN,
    "python -m mnist_exp.runs prune --older-than 30d --keep-best 5": RUN,
    "python -m mnist_exp.runs show RUN_ID": "tests/commands/test_runs.py",
    "python -m mnist_exp.runs diff RUN_ID OTHER_ID": "tests/commands/test_runs.py",
    "python -m mnist_exp.runs best latest": "tests/commands/test_runs.py",
    "python -m mnist_exp.runs promote --run RUN_ID --name mnist --alias champion": "tests/commands/test_promote.py",
    "python -m mnist_exp.runs promote --sweep latest --name mnist --alias champion": "tests/commands/test_promote.py",
    "python -m mnist_exp.predict photo.jpg": BELOW,
    "python -m mnist_exp.predict --model latest --out predictions.csv --sheet sheet.png FOLDER": BELOW,
    "python -m mnist_exp.draw": "tests/serving/test_draw.py",
    "python -m mnist_exp.evaluate model=latest data=mnist": BELOW,
    "python scripts/preparation.py --count 10000 --sheet worst.png --photos 500": PARSED,
    "python scripts/benchmarks/serving.py": PARSED,
    "mlflow models serve -m models:/mnist@champion --env-manager local --port 5001": "tests/serving/test_serve.py",
    "curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d \"$(python -c 'import json; "
    'print(json.dumps({"inputs": [[[[0] * 28] * 28]]}))\')"': "run by tests/serving/test_serve.py",
    "python -m mnist_exp.runs export latest FOLDER": "tests/tracking/test_transfer.py",
    "python -m mnist_exp.runs import FOLDER": "tests/tracking/test_transfer.py",
    "python -m mnist_exp.ui": "tests/commands/test_ui.py",
    "python -m mnist_exp.ui --view curves": "tests/commands/test_ui.py",
    'mlflow run . --env-manager local -P overrides="optimizer=adam"': RUN,
    'eval "$(mnist-exp -sc install=bash)"': RUN,
    "python -m mnist_exp.run resume=RUN_ID": "tests/commands/test_faults.py",
    "python -m mnist_exp.runs rerun RUN_ID": "tests/sweep/test_sweep.py",
    "python -m mnist_exp.run -m sweep.resume=latest": "tests/sweep/test_sweep.py",
    "python -m mnist_exp.run -m sweep.extend=latest 'seed=range(5,20)'": "tests/sweep/test_extend.py",
    "python -m mnist_exp.run -m sweep.extend=latest model=plain_cnn_matched": "tests/sweep/test_extend.py",
    "python -m mnist_exp.run -m model=se_cnn,plain_cnn 'seed=range(0,20)' plan.baseline=plain_cnn plan.metric=test/accuracy"
    " plan.margin=0.1 plan.seeds=20": COMPOSED,
    "python -m mnist_exp.run -m arm=se,plain 'seed=range(0,5)'": COMPOSED,
    "python -m mnist_exp.compare factor=arm baseline=plain": COMPOSED,
    "python -m mnist_exp.compare factor=model baseline=plain_cnn margin=0.1 export=runs.csv": "tests/comparison/test_compare.py",
    "python -m mnist_exp.compare results=runs.csv factor=model baseline=plain_cnn margin=0.1": "tests/comparison/test_compare.py",
    "python scripts/simulations.py": PARSED,
    "python -m mnist_exp.run -m experiment=reference": COMPOSED,
    "python -m mnist_exp.run -m experiment=se_vs_plain": COMPOSED,
    "python -m mnist_exp.run -m data=digits '~phases.train' phases.finetune.epochs=1 'seed=range(0,1000)'": COMPOSED,
    "python -m mnist_exp.run -m model=se_cnn,plain_cnn batch_size=128,256,512 'seed=range(0,5)'": COMPOSED,
    "python -m mnist_exp.run -m data=mnist_tuning optimizer=adamw,muon 'seed=range(0,10)'": COMPOSED,
    "python -m mnist_exp.run -m hydra/sweeper=optuna data=mnist_tuning 'optimizer.lr=tag(log,interval(0.05,1))'"
    " 'model.dropout=choice(0,0.1)'": COMPOSED,
    "python -m mnist_exp.run -m experiment=record teacher=none phases.train.label_smoothing=0.1 seed=600,601": COMPOSED,
    "python -m mnist_exp.run -m experiment=record 'teacher.runs=[TEACHER_1,TEACHER_2]'": COMPOSED,
    "python -m mnist_exp.run -m experiment=under_10k 'teacher.runs=[TEACHER_1,TEACHER_2]'": COMPOSED,
    "python -m mnist_exp.run -m hydra/launcher=slurm output_dir=/shared/outputs model=se_cnn,plain_cnn"
    " 'seed=range(0,20)'": COMPOSED,
    "python -m mnist_exp.run optimizer=nadam scheduler=linear augmentation=noise model=mlp": COMPOSED,
    "python -m mnist_exp.compare factor=model baseline=plain_cnn": COMPOSED,
    "python -m mnist_exp.compare factor=optimizer metrics=val/accuracy": COMPOSED,
    "python scripts/benchmarks/run.py": PARSED,
    "python scripts/benchmarks/timeline.py --before CHECKOUT --figure FILE": PARSED,
    "python scripts/benchmarks/sweep.py --rounds 2": PARSED,
    "python scripts/benchmarks/compare.py": PARSED,
    "python tests/stress/kill_and_resume.py": PARSED,
    "python tests/stress/kill_sweeps.py": PARSED,
    "python tests/stress/soak.py": PARSED,
    "python tests/stress/soak.py --processes 2": PARSED,
    "pytest -m slow tests/comparison/test_statistics.py": "part of pytest -m slow, which .ci/run runs",
    "pip install --extra-index-url https://download.pytorch.org/whl/cpu -e .": "needs a package index of its own",
    "pip install -e '.[slurm]'": "needs a cluster; pytest -m cluster runs sweeps on one",
    'mlflow server --host 0.0.0.0 --allowed-hosts "$(hostname):5000" --backend-store-uri sqlite:////shared/mlflow.db'
    " --artifacts-destination /shared/artifacts &": "needs a cluster; tests/commands/test_faults.py starts servers",
    "export MLFLOW_TRACKING_URI=http://$(hostname):5000 MNIST_ROOT=/shared/data": "needs a cluster",
    "pre-commit install": "changes the repository's hooks",
}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def chosen(check: str, prefix: str = "") -> list[str]:
    """The commands that get a check."""
    return [command for command, value in COMMANDS.items() if value == check and command.startswith(prefix)]


def overrides_of(command: str) -> list[str]:
    """The overrides in a command, with ids instead of placeholders."""
    for placeholder, run_id in IDS.items():
        command = command.replace(placeholder, run_id)
    return [word for word in shlex.split(command)[3:] if word != "-m"]


def first_job(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first job."""
    job = []
    for override in parse(overrides):
        if override.is_sweep_override():
            is_discrete = override.is_discrete_sweep()
            value = next(override.sweep_string_iterator()) if is_discrete else override.value().start
            job.append(f"{override.get_key_element()}={value}")
        else:
            job.append(override.input_line)
    return job


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The examples of docs/extending.md: the override that adds their YAML files to conf/. Their code joins its module."""
    learning = (augmentation, datasets, evaluation, models, optim)
    modules: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in learning}
    before = {name: set(vars(module)) for name, module in modules.items()}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        if block.startswith("# mnist_exp/metrics.py\n"):
            entry = eval(block, vars(metrics))
            monkeypatch.setitem(metrics.METRICS, entry.name, entry)
            continue
        name = re.match(r"# mnist_exp/learning/(\w+)\.py\n", block)
        assert name, block
        exec(block, vars(modules[name[1]]))
    for block in blocks(ROOT / "docs" / "extending.md", "yaml"):
        path = tmp_path / block.split()[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield f"hydra.searchpath=[file://{tmp_path}/conf]"
    del evaluation.EVALUATED["macro_f1"]
    for name, module in modules.items():
        for added in vars(module).keys() - before[name]:
            delattr(module, added)


def test_every_command_is_listed() -> None:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    assert {line.split("  #")[0].strip() for line in lines} == COMMANDS.keys()


def test_the_listed_checks_exist() -> None:
    opening = [block.strip() for block in blocks(README, "bash")[:2]]
    ci = [*opening, *(line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines())]
    for command in chosen(CI):
        assert command in ci or all(part in ci for part in command.split(" && ")), f".ci/run does not run {command}"
    for command, check in COMMANDS.items():
        if check.startswith("tests/"):
            words = [word for word in shlex.split(command) if not re.fullmatch("(RUN|OTHER)_ID", word)]
            word = words[-1].removesuffix("RUN_ID")
            assert word in (ROOT / check).read_text(), f"{check} does not run {command}"


@pytest.mark.parametrize("command", chosen(COMPOSED, "python -m mnist_exp.run"))
def test_a_long_command_composes(command: str, extensions: str) -> None:
    overrides = [override for override in first_job(overrides_of(command)) if not override.startswith("hydra/launcher=")]
    full = compose("config", [extensions, *overrides], return_hydra_config=True)
    preset = [f"{key}={value}" for key, value in (full.hydra.sweeper.get("params") or {}).items()]
    config = resolve(compose("config", [extensions, *first_job(preset), *overrides]))
    build(config["model"], "model", **MNIST_SHAPE)


def test_the_metric_is_evaluated_and_has_a_format(extensions: str) -> None:
    logits, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    values = evaluation.Evaluation(logits, labels).metrics
    assert values["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics.format_metric("test/macro_f1", values["macro_f1"]) == "77.78 %"


@pytest.mark.parametrize("command", chosen(COMPOSED, "python -m mnist_exp.compare"))
def test_a_comparison_composes(command: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check_comparison(as_dict(compose("compare", overrides_of(command))))


def test_the_options_of_scripts_exist() -> None:
    for command in chosen(PARSED):
        _, script, *arguments = command.split()
        options = [word for word in arguments if word.startswith("--")]
        assert all(f'"{option}"' in (ROOT / script).read_text() for option in options), command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with a store and an output folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("conf", "hydra_plugins", "mnist_exp", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "MLproject", folder / "MLproject")
    return folder


@pytest.fixture(scope="module")
def trained_checkout(checkout: Path, mnist_root: Path) -> Path:
    """The same, after the first command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MNIST_ROOT"] = str(mnist_root.absolute())
    command = ["python", "-m", "mnist_exp.run", "data.fallback=null"]
    subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=True)
    return checkout


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen(RUN))
def test_a_short_command_runs(command: str, checkout: Path, mnist_root: Path, request: pytest.FixtureRequest) -> None:
    if "mnist_exp.runs" in command:  # an empty store is an error
        request.getfixturevalue("trained_checkout")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MNIST_ROOT"] = str(mnist_root.absolute())
    done = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_model_of_the_first_command_reads_a_photo(trained_checkout: Path, mnist_root: Path) -> None:
    checkout = trained_checkout
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MNIST_ROOT"] = str(mnist_root.absolute())
    photo = Image.new("RGB", (1200, 900), (214, 205, 190))
    ImageDraw.Draw(photo).line([(500, 250), (690, 240), (560, 640)], fill=(40, 45, 90), width=34, joint="curve")
    photo.save(checkout / "photo.jpg")
    (checkout / "FOLDER").mkdir()
    photo.save(checkout / "FOLDER" / "seven.png")
    (snippet,) = blocks(README, "python")
    (checkout / "snippet.py").write_text(snippet)

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert re.search(r"photo\.jpg +\S +7 ", run("python -m mnist_exp.predict photo.jpg"))
    assert run("python snippet.py").startswith("[7] [0.")
    run("python -m mnist_exp.predict --model latest --out predictions.csv --sheet sheet.png FOLDER")
    assert (checkout / "predictions.csv").read_text().splitlines()[1].startswith("FOLDER/seven.png,7,0.")
    assert "evaluate/accuracy" in run("python -m mnist_exp.evaluate model=latest data=mnist")


def test_the_extensions_train(extensions: str, tmp_path: Path, digits, short_digits) -> None:
    parts = {f"{part}_{kind}": getattr(digits.splits[part], kind) for part in ("train", "test") for kind in ("images", "labels")}
    arrays = {name: value.numpy() if name.endswith("labels") else value.squeeze(1).numpy() for name, value in parts.items()}
    np.savez(tmp_path / "digits.npz", **arrays)
    overrides = ["optimizer=nadam", "scheduler=linear", "augmentation=noise", "model=mlp", "data=npz"]
    config = resolve(compose("config", [extensions, *overrides, f"data.path={tmp_path}/digits.npz"]))
    bind(config)
    assert len(build(config["data"], "data", seed=0).splits["test"]) == 360
    model = build(config["model"], "model", **MNIST_SHAPE)
    phases = {name: build(node, name) for name, node in config["phases"].items()}
    prepared = prepare_phases(model, phases, short_digits, tmp_path)
    *_, last = fit(model, prepared, short_digits, seed=0, precision=torch.float32)
    assert last.metrics["train/loss"] < 5


def test_the_quoted_error_is_the_real_one() -> None:
    (quoted,) = [block for block in blocks(README, "text") if block.startswith("$")]
    command, message = quoted.removeprefix("$ ").strip().split("\n")
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(UserError) as error:
        resolve(compose("config", overrides_of(command)))
    assert str(error.value) == message


def anchors(page: Path) -> set[str]:
    """The fragments of a page that links can point to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not fragment or fragment in anchors(target), f"{page.name} links to {link}"


def test_every_picture_is_shown_and_small() -> None:
    shown = {Path(link).name for page in PAGES for link in re.findall(r"images/[\w.-]+", page.read_text())}
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.name in shown
        assert picture.stat().st_size < 150_000, f"{picture.name} is large"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_file_tree_is_complete() -> None:
    (tree,) = [block for block in blocks(README, "text") if block.startswith("mnist_exp/")]
    paths, folders = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        paths.add("".join(folders))
    for path in paths:
        assert (ROOT / path).exists(), f"{path} is not there"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "mnist_exp").rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in paths if path.endswith(".py")} == package
