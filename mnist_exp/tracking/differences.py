"""The differences between two runs: configuration, code, packages, machine, data and metrics."""

import re
from collections.abc import Mapping

from mnist_exp.config import nodes
from mnist_exp.metrics import format_metric
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import StoredRun
from mnist_exp.tracking.mlflow_store import MLflowStore, download

CODE = {tag.COMMIT: "commit", tag.BRANCH: "branch", tag.DIRTY: "uncommitted changes", "code": "digest of the package"}
MACHINE = ("python", "os", "cpu", "cpu.cores", "threads", "gpu")
PATCH, PACKAGES = "provenance/uncommitted.diff", "provenance/packages.txt"

Section = dict[str, tuple[str, str]]  # the values of both runs by name; a missing one is empty


def differences(store: MLflowStore, first_id: str, second_id: str) -> dict[str, Section]:
    """Return only the values in which two runs differ, by section; a section without differences is empty.

    Args:
        store: The store of both runs.
        first_id: The id of a run.
        second_id: The id of another run.

    Raises:
        UserError: A run does not exist, is a sweep, or has no readable recipe.
    """
    runs = [store.read(run_id) for run_id in (first_id, second_id)]
    first, second = (_describe(store, run) for run in runs)
    return {section: _differing(first[section], second[section]) for section in first}


def _describe(store: MLflowStore, run: StoredRun) -> dict[str, dict[str, str]]:
    record = run.record
    tags = record.tags
    return {
        "configuration": {key: str(value) for key, value in nodes(run.recipe.config) if not isinstance(value, dict | list)},
        "code": {name: tags[key] for key, name in CODE.items() if key in tags} | _changed_files(_text(store, run, PATCH)),
        "packages": dict(line.split("==", 1) for line in _text(store, run, PACKAGES).splitlines() if "==" in line),
        "machine": {key: tags[key] for key in MACHINE if key in tags},
        "data": {"name": record.data} | {f"digest of {split}": digest for split, digest in record.digests.items()},
        "metrics": {name: format_metric(name, value) for name, value in sorted(record.metrics.items())},
    }


def _text(store: MLflowStore, run: StoredRun, path: str) -> str:
    """Return a text file of a run, empty if it has none."""
    try:
        return download(store.client, run.record.run_id, path).decode(errors="replace")
    except OSError:
        return ""


def _changed_files(patch: str) -> dict[str, str]:
    """Return the number of added and removed lines of each file in a patch, and git's digest of its new content."""
    files = {}
    for part in re.split(r"^diff --git ", patch, flags=re.MULTILINE)[1:]:
        name = part.splitlines()[0].rpartition(" b/")[2]
        added, removed = (len(re.findall(rf"^\{sign}(?!\{sign})", part, flags=re.MULTILINE)) for sign in "+-")
        blob = re.search(r"^index \w+\.\.(\w{1,10})", part, flags=re.MULTILINE)
        files[name] = f"+{added} -{removed} lines" + (f", {blob[1]}" if blob else "")
    return files


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> Section:
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key, ""), second.get(key, "")) for key in keys if first.get(key) != second.get(key)}
