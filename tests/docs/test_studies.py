"""The answers of the studies follow from the tables that are published with them."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import Call
from test_documentation import README, ROOT, blocks

from mnist_exp import compare

FOLDER = ROOT / "docs" / "studies"
COMPARE = "python -m mnist_exp.compare --results "
QUOTED = re.compile(r"[-+]\d+\.\d\d points \([-+]\d+\.\d\d to [-+]\d+\.\d\d")  # a difference with its interval


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith(COMPARE)]


@pytest.mark.parametrize("page", [page for page in FOLDER.glob("*.md") if commands(page)], ids=lambda page: page.stem)
def test_a_study_is_reproduced_without_training(page: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "250")
    printed = ""
    for command in commands(page):
        done = call(compare.main, *shlex.split(command.partition(" #")[0])[3:])
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    quoted = QUOTED.findall(page.read_text())
    assert quoted
    in_readme = [line for line in README.read_text().splitlines() if f"studies/{page.name}" in line]
    for answer in quoted + QUOTED.findall(" ".join(in_readme)):
        assert answer in printed, f"{page.name} quotes {answer}"
