"""Where a resumed or repeated run looks for its data."""

from pathlib import Path

import pytest
from conftest import MNIST, Compose

from mnist_exp import paths
from mnist_exp.experiment import repeat
from mnist_exp.experiment.repeat import locate_data
from mnist_exp.settings import Node

THERE, GONE = "/", "/proc/nowhere"


def locate(composed: Compose, present: Node, option: str = "mnist", **changes: object) -> Node:
    """Return the node of the data of a stored run with some changes."""
    settings = composed(f"data={option}")
    return locate_data(settings.model_copy(update={"data": settings.data | changes}), present)


def test_the_recorded_place_is_read_if_it_exists(composed: Compose) -> None:
    """Nothing is ever downloaded to a place from a record."""
    present = composed("data=mnist").data
    stored = {"root": THERE, "download_root": "/home/somebody", "fallback": None, "subset": 7}
    found = locate(composed, present, **stored)
    assert (found["root"], found["subset"]) == (THERE, 7)
    assert found["download_root"] == present["download_root"] != "/home/somebody"
    assert locate(composed, present | {"root": "/tmp"}, root=GONE)["root"] == "/tmp"
    description = MNIST.model_copy(update={"locations": {"root": THERE}})
    settings = composed("data=mnist").model_copy(update={"data_description": description})
    assert locate_data(settings, present)["root"] == THERE, "the place where the data were found"


def test_the_command_line_and_the_user_s_defaults_go_first(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    present = composed("data=mnist").data | {"root": "/tmp"}
    monkeypatch.setitem(paths.typed, "data.root", "/tmp")
    assert locate(composed, present, root=THERE)["root"] == "/tmp"
    monkeypatch.delitem(paths.typed, "data.root")
    assert locate(composed, present, root=THERE)["root"] == THERE
    monkeypatch.setattr(repeat, "local_defaults", lambda group: {"root": "/tmp"})
    assert locate(composed, present, root=THERE)["root"] == "/tmp"


def test_the_place_of_other_data_is_kept(composed: Compose, tmp_path: Path) -> None:
    present = composed("data=mnist").data
    assert locate(composed, present, "folder", root=str(tmp_path))["root"] == str(tmp_path)
    assert locate(composed, present, "folder", root=GONE)["root"] == GONE, "the message names the place that was recorded"
