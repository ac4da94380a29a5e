"""The answers of the studies follow from the tables that are published with them."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from conftest import Call
from studies import ended_seeds, merged
from test_documentation import README, ROOT, blocks

from mnist_exp import compare

FOLDER = ROOT / "docs" / "studies"
COMPARE = "python -m mnist_exp.compare --results "
NUMBER = r"[-+]?\d+\.\d+"
INTERVAL = rf"{NUMBER}(?: points)? \({NUMBER} to {NUMBER}"


def quotes(page: Path) -> set[tuple[str, str]]:
    """The arms that a page names, each with its difference and interval: in a sentence, or as the first cell of a row."""
    text = page.read_text()
    found = set(re.findall(rf"`(\w+)`[^`|\d]*?({INTERVAL})", " ".join(text.split())))
    rows = re.findall(r"^\| `?(\w+)`? \|(.*)", text, re.MULTILINE)
    found |= {(arm, interval) for arm, cells in rows for interval in re.findall(INTERVAL, cells)}
    return {(arm, interval.replace(" points", "")) for arm, interval in found}


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
        printed += done.stdout.replace(" points", "")
    assert quotes(page)
    for arm, interval in quotes(page):
        assert re.search(rf"\b{arm}\b.*{re.escape(interval)}", printed), f"{page.name} quotes {arm} {interval}"


def test_the_readme_quotes_the_studies() -> None:
    assert quotes(README)
    assert quotes(README) <= {quote for page in FOLDER.glob("*.md") for quote in quotes(page)}


def test_blocks_of_seeds_become_one_table() -> None:
    keys = ["model", "seed"]
    jobs = [{"look": "1", "model": model, "seed": seed} for seed in "012" for model in "ab"]
    runs = pd.DataFrame(jobs).assign(run=list("uvwxyz"), status="FINISHED", processor="cpu")
    first = runs.copy()
    first.loc[3, "status"] = "KILLED"  # seed 1 of b
    table = ended_seeds(first, keys)
    assert list(table["status"]) == ["FINISHED"] * 2 + ["NOT STARTED"] * 2 + ["FINISHED"] * 2
    assert set(table.loc[2:3, "run"]) == {""}
    second = runs[runs["seed"] == "1"].assign(processor="other")
    found = merged(table, second, keys)
    assert list(found["run"]) == list("uvwxyz"), "in the planned order"
    assert list(found["processor"]) == ["cpu"] * 2 + ["other"] * 2 + ["cpu"] * 2
    pd.testing.assert_frame_equal(merged(found, second, keys), found)
    mixed = runs.copy()
    mixed.loc[0, "processor"] = "other"
    assert set(ended_seeds(mixed, keys).loc[0:1, "status"]) == {"NOT STARTED"}
    with pytest.raises(SystemExit):
        merged(table, second.drop(columns="run"), keys)
