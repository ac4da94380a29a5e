"""Every command, link, picture and example in README.md and the other pages is real."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from card import card
from conftest import MNIST, MNIST_SHAPE, Call, CommandLine, Compose
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser  # Hydra has no public parser of its flags
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep
from PIL import Image, ImageDraw

from mnist_exp.nodes import build
from mnist_exp.paths import CONF, NAME
from mnist_exp.run import main
from mnist_exp.tracking.models import save_model

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EXTENDING = ROOT / "docs" / "extending.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9]*\Z")  # such as RUN_ID or FOLDER: a number serves as the start of an id and as a name


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines_of_bash() -> list[str]:
    """The lines of all bash blocks, each once."""
    text = "".join(block for page in PAGES for block in blocks(page, "bash"))
    return [*dict.fromkeys(text.replace("\\\n", " ").splitlines())]


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without comments."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    words.whitespace_split = True
    for is_operator, group in groupby(words, lambda word: not word.strip("&;|")):
        if not is_operator:
            yield list(group)


def first_job(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first job. A glob is left out: it chooses among the options that there are."""
    job = []
    for override in OverridesParser.create().parse_overrides(overrides):
        value = override.value()
        if isinstance(value, IntervalSweep):
            job.append(f"{override.get_key_element()}={value.start}")
        elif not override.is_sweep_override():
            job.append(override.input_line)
        elif not isinstance(value, Glob):
            job.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
    return job


def check_composes(words: list[str], searchpath: str) -> None:
    """Compose the configuration of a run, or of a sweep's first job, whose launcher need not be installed."""
    typed = [word for word in get_args_parser().parse_args(words).overrides if not word.startswith("hydra/launcher=")]
    overrides = [searchpath, *first_job(typed)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if params := compose("config", overrides, return_hydra_config=True).hydra.sweeper.get("params"):
            compose("config", [*first_job([f"{key}={value}" for key, value in params.items()]), *overrides])


@pytest.fixture(scope="module")
def searchpath(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that adds the YAML files which docs/extending.md shows."""
    folder = tmp_path_factory.mktemp("extensions")
    write_examples(folder)
    return f"hydra.searchpath=[file://{folder}/conf]"


def write_examples(folder: Path) -> None:
    """Write the YAML files of docs/extending.md, and add its code to the modules; the first line of a block names its file.

    Before it, there may be a directive of Hydra, which must come first: # @package
    """
    for block in blocks(EXTENDING, "yaml") + blocks(EXTENDING, "python"):
        if not (name := re.match(r"(?:# @.*\n)?# (\S+\.(?:yaml|py))\n", block)):
            continue
        if name[1] == "mnist_exp/metrics.py":
            block = f"added = (\n{block})\nMETRICS[added.name] = added\n"
        path = folder / name[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(block)


@pytest.mark.parametrize("line", lines_of_bash())
def test_a_command_parses(line: str, searchpath: str) -> None:
    for command in commands(line):
        match command:
            case ["python", "-m", "mnist_exp.run", *words]:
                check_composes(words, searchpath)
            case ["python", "-m", module, *words] if module.startswith("mnist_exp."):
                import_module(module).parser().parse_args([PLACEHOLDER.sub("12345678", word) for word in words])
            case ["python", script, *words] if script.endswith(".py"):
                text = (ROOT / script).read_text()
                assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == []


def test_the_quoted_errors_are_the_real_ones(call: Call) -> None:
    for quoted in (block for page in PAGES for block in blocks(page, "text") if block.startswith("$ python -m mnist_exp.run")):
        command, message = quoted.removeprefix("$ ").strip().split("\n", 1)
        assert message in call(main, *shlex.split(command)[3:]).stderr


def test_the_tracker_that_is_shown_is_that_of_the_examples() -> None:
    (shown,) = [block for block in blocks(EXTENDING, "python") if "CsvStore" in block]
    example = (ROOT / "docs" / "examples" / "csv_tracker.py").read_text()
    assert set(shown.splitlines()) <= set(example.splitlines())


def anchors(page: Path) -> set[str]:
    """The fragments of a page that links can point to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not fragment or fragment in anchors(target), f"{page.name} links to {link}"


def test_the_files_that_the_architecture_lists_exist() -> None:
    folders: list[str] = []
    for tree in (block for block in blocks(ARCHITECTURE, "text") if block.startswith("mnist_exp/")):
        for indent, name in re.findall(r"^( *)(\S+)", tree, flags=re.MULTILINE):
            folders = [*folders[: len(indent) // 2], name]
            assert ROOT.joinpath(*folders).exists(), "".join(folders)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package and its configuration: a process that runs there uses these, and leaves its runs there."""
    for name in ("conf", "hydra_plugins", NAME):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
    return tmp_path


@pytest.mark.slow
def test_the_extensions_train(copy: Path) -> None:
    write_examples(copy)
    images, labels = np.random.default_rng(0).integers(0, 256, (6400, 28, 28), np.uint8), np.arange(6400) % 10
    np.savez(copy / "digits.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    parts = ["optimizer=nadam", "scheduler=linear", "augmentation=affine_noise", "loss=margin", "callbacks=[gradients]"]
    options = ["phase=[warmup,train,finetune]", "model=mlp", "data=npz", "objective=val/macro_f1", "tracking=none"]
    frozen = "phases.warmup.callbacks.freeze.modules=[hidden]"
    mixed = ["phase=[train]", "callbacks=[mixup]", "data.fallback=digits", "tracking=none"]
    for words in ([*parts, *options, frozen], mixed):
        command = [sys.executable, "-m", "mnist_exp.run", *words]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "test/macro_f1" in done.stdout


# Executes the cells on its input in one namespace, and writes the figures that show data to NUMBER.png.
EXECUTE = """
import json, sys
import matplotlib.pyplot as plt
namespace = {}
for number, cell in enumerate(json.load(sys.stdin)):
    exec(compile(cell, f"cell {number}", "exec"), namespace)
for number in plt.get_fignums():
    if any(axes.has_data() for axes in plt.figure(number).axes):
        plt.savefig(f"{number}.png", bbox_inches="tight")
"""


@pytest.mark.slow
def test_the_notebook_runs(copy: Path, store: str) -> None:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE],
        input=json.dumps(sources),
        cwd=copy,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = sum(source.count("plt.subplots(") for source in sources)
    assert len(list(copy.glob("*.png"))) == figures
    assert len(list((copy / "outputs").iterdir())) > 1, "a run, and the jobs of a sweep"
    assert not any(cell.get("outputs") for cell in cells), "Clear the outputs before you commit the notebook."


@pytest.mark.slow
def test_the_model_of_the_first_command_reads_a_photo(
    command_line: CommandLine, store: str, mnist_root: Path, tmp_path: Path
) -> None:
    trained = command_line("data.fallback=null", MNIST_ROOT=str(mnist_root.absolute()))
    assert trained.returncode == 0, trained.stderr
    photo = Image.new("RGB", (1200, 900), (214, 205, 190))
    ImageDraw.Draw(photo).line([(500, 250), (690, 240), (560, 640)], fill=(40, 45, 90), width=34, joint="curve")
    photo.save(tmp_path / "photo.jpg")
    (snippet,) = blocks(README, "python")

    def printed(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert re.search(r"photo\.jpg +\S +7 ", printed("-m", "mnist_exp.predict", "photo.jpg"))
    model, predicted = printed("-c", snippet).splitlines()
    assert "test/accuracy" in model
    assert predicted.startswith("[7] [0.")


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_card_of_a_model_names_its_results_and_how_to_load_it(composed: Compose, tmp_path: Path) -> None:
    settings = composed().model_copy(update={"data_description": MNIST})
    save_model(tmp_path / "model", build(settings.model, "model", **MNIST_SHAPE), settings, {"test/accuracy": 0.9873})
    text = card(tmp_path / "model")
    assert "| test/accuracy | 98.73 % |" in text
    assert "19,674 parameters" in text
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    (predict,) = [words[2:] for line in lines for words in commands(line) if words[:2] == ["python", "-m"]]
    import_module(predict[0]).parser().parse_args(predict[1:])
