"""A copy that was installed, not editable, run by somebody who has no checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mnist_exp.paths import CHECKOUT, CONF

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a checkout that was used, with the builder's own defaults, runs and data."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    subprocess.run(["git", "clone", "--quiet", CHECKOUT, source], check=True)
    for junk in ("conf/local/default.yaml", "data/file", "mlartifacts/file", "mlruns/file", "mlflow.db", "outputs/file"):
        (source / junk).parent.mkdir(parents=True, exist_ok=True)
        (source / junk).write_text("seed: 4711")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the copy; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
    subprocess.run([*pip, sdist], check=True)
    return folder


def test_a_wheel_of_the_checkout_lacks_the_defaults_of_its_builder(sdist: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=sdist.parents[1], check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "mnist_exp/conf/config.yaml" in names
    assert not [name for name in names if "conf/local" in name]


def run(installed: Path, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)


def test_the_sources_are_those_of_the_repository_without_what_its_use_left(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    tracked = set(listed.removesuffix("\0").split("\0"))
    assert {name for name in packed - tracked if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}
    assert {name.partition("/")[0] for name in tracked - packed} == {".github", ".gitignore", ".pre-commit-config.yaml"}


def test_the_copy_has_all_options_but_not_the_defaults_of_its_builder(installed: Path) -> None:
    own = {path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent != CONF / "local"}
    conf = installed / "mnist_exp" / "conf"
    assert {path.relative_to(conf) for path in conf.rglob("*") if path.is_file() and "__pycache__" not in path.parts} == own


def test_it_trains_into_the_current_folder(installed: Path, tmp_path: Path) -> None:
    composed = run(installed, tmp_path, "mnist_exp.run", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    done = run(installed, tmp_path, "mnist_exp.run", "data=digits", "~phases.train")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlartifacts", "outputs"}
    assert "test/accuracy" in done.stdout
    picture = Image.new("L", (100, 100), "white")
    ImageDraw.Draw(picture).line([(50, 15), (50, 85)], fill="black", width=8)
    picture.save(tmp_path / "one.png")
    predicted = run(installed, tmp_path, "mnist_exp.predict", "one.png")
    assert "one.png" in predicted.stdout, predicted.stderr
    listed = run(installed, tmp_path, "mnist_exp.runs", "list")
    assert "FINISHED" in listed.stdout, listed.stderr


def test_it_sweeps_and_compares(installed: Path, tmp_path: Path) -> None:
    swept = run(installed, tmp_path, "mnist_exp.run", "-m", "data=digits", "~phases.train", "model=se_cnn,plain_cnn", "seed=0,1")
    assert swept.returncode == 0, swept.stderr
    compared = run(installed, tmp_path, "mnist_exp.compare", "--factor", "model")
    assert compared.returncode == 0, compared.stderr
    assert "plain_cnn" in compared.stdout
