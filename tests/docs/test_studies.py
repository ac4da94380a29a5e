"""The answers of the studies follow from the tables that are published with them."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from conftest import Call
from studies import chosen, ended_seeds, merged
from test_documentation import README, ROOT, blocks

from mnist_exp import compare

FOLDER = ROOT / "docs" / "studies"
COMPARE = "python -m mnist_exp.compare --results "
NUMBER = r"[-+]?\d+\.\d+"
INTERVAL = rf"{NUMBER} \({NUMBER} to {NUMBER}"


def quotes(page: Path) -> set[tuple[str, ...]]:
    """The arms that a page names, each with its difference and interval in a sentence, or with those of its row in a table."""
    text = page.read_text().replace(" points", "")
    rows = re.findall(r"^\| `?([\w.]+)`? \|(.*)", text, re.MULTILINE)
    found = {(arm, *intervals) for arm, cells in rows if (intervals := re.findall(INTERVAL, cells))}
    return found | set(re.findall(rf"`(\w+)`[^`|\d]*?({INTERVAL})", " ".join(text.split())))


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
    for arm, *intervals in quotes(page):  # a row has the order of the levels
        lines = [rf"\b{re.escape(arm)}\b.*{re.escape(interval)}(?!\d)" for interval in intervals]
        assert re.search(r"(?s:.*?)".join(lines), printed), f"{page.name} quotes {arm} {intervals}"


def test_the_readme_quotes_the_studies() -> None:
    assert quotes(README)
    published = [quote for page in FOLDER.glob("*.md") for quote in quotes(page)]
    assert quotes(README) <= {(arm, interval) for arm, *intervals in published for interval in intervals}


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


def test_some_jobs_of_a_sweep_are_chosen() -> None:
    runs = pd.DataFrame({"batch_size": ["64", "512", "64"], "seed": ["0", "0", "1"]})
    assert list(chosen(runs, "batch_size", "64")["seed"]) == ["0", "1"]
    for key, value in (("batch_size", "7"), ("hue", "64")):
        with pytest.raises(SystemExit):
            chosen(runs, key, value)
