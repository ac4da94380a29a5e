"""Where a resumed or repeated run looks for its data."""

from pathlib import Path

import pytest
from conftest import Compose

from mnist_exp import paths
from mnist_exp.experiment import repeat
from mnist_exp.experiment.repeat import locate_data

THERE, GONE = "/", "/proc/nowhere"


def test_the_recorded_place_is_read_if_it_exists(composed: Compose) -> None:
    """Nothing is ever downloaded to a place from a record."""
    present = composed("data=mnist").data
    stored = present | {"root": THERE, "download_root": "/home/somebody", "fallback": None, "subset": 7}
    found = locate_data(stored, present)
    assert (found["root"], found["subset"]) == (THERE, 7)
    assert found["download_root"] == present["download_root"] != "/home/somebody"
    assert found["fallback"] == "digits"
    assert locate_data(stored | {"root": GONE}, present | {"root": "/tmp"})["root"] == "/tmp"


def test_the_command_line_and_the_user_s_defaults_go_first(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    present = composed("data=mnist").data | {"root": "/tmp"}
    stored = present | {"root": THERE}
    monkeypatch.setitem(paths.typed, "data.root", "/tmp")
    assert locate_data(stored, present)["root"] == "/tmp"
    monkeypatch.delitem(paths.typed, "data.root")
    assert locate_data(stored, present)["root"] == THERE
    monkeypatch.setattr(repeat, "local_defaults", lambda group: {"root": "/tmp"})
    assert locate_data(stored, present)["root"] == "/tmp"


def test_the_place_of_other_data_is_kept(composed: Compose, tmp_path: Path) -> None:
    stored = composed("data=folder").data | {"root": str(tmp_path)}
    assert locate_data(stored, composed("data=mnist").data) == stored
    lost = stored | {"root": GONE}
    assert locate_data(lost, composed("data=mnist").data) == lost, "the message names the place that was recorded"
