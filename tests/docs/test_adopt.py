"""The package under another name, as docs/adopt.md describes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_exp.paths import CHECKOUT, DISTRIBUTION, NAME

NEW = "petal_net"


def tracked_files(folder: Path) -> list[str]:
    """The files that git knows, as paths relative to a folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, check=True, capture_output=True, text=True).stdout
    return listed.removesuffix("\0").split("\0")


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """A copy of the checkout, renamed by the commands of the page."""
    copy = tmp_path / "copy"
    for name in tracked_files(CHECKOUT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, copy / name)
    page = (CHECKOUT / "docs" / "adopt.md").read_text()
    (block,) = [found for found in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if found.startswith("NEW=")]
    commands = re.sub("NEW=.*", f"NEW={NEW}", block)
    subprocess.run(["bash", "-ec", f"git init --quiet && git add --all\n{commands}"], cwd=copy, check=True)
    return copy


@pytest.mark.slow
def test_the_renamed_package_trains_and_names_the_old_one_nowhere(renamed: Path, tmp_path: Path) -> None:
    named = [
        name
        for name in tracked_files(renamed)
        for old in (NAME, DISTRIBUTION)
        if old in name or old.encode() in (renamed / name).read_bytes().lower()
    ]
    assert set(named) == {"LICENSE"}, "whose copyright notice must stay"

    installed = tmp_path / "installed"  # of which this test needs the metadata: python -m finds the package in the current folder
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", installed]
    subprocess.run([*pip, renamed], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONPATH": str(installed), f"{NEW.upper()}_LOCAL": "none"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=renamed, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", f"import {NEW}; print({NEW}.__file__)").strip() == str(renamed / NEW / "__init__.py")
    assert f"_target_: {NEW}." in run("-m", f"{NEW}.run", "--cfg", "job")
    assert f"python -m {NEW}.ui" in run("-m", f"{NEW}.run", "data=digits", "~phases.train")
    assert "FINISHED" in run("-m", f"{NEW}.runs", "list")
    swept = run("-m", f"{NEW}.run", "-m", "data=digits", "~phases.train", "seed=0,1")
    assert "2 of 2 jobs finished" in swept, "Hydra finds the sweeper and the launcher under their new names"
