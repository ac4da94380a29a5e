import os
import zipfile
from pathlib import Path

import pytest
import torch

from mnist_exp.tracking import graph_cache

FILES = {"MLmodel": b"flavors: {}", "data/model.pt2": b"graph"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mnist_exp" / "graphs"


def add(key: str) -> None:
    with graph_cache.lock_graph(key) as file:
        graph_cache.write_files(file, FILES)


def find(key: str) -> dict[str, bytes] | None:
    with graph_cache.lock_graph(key) as file:
        return graph_cache.read_files(file, set(FILES))


def test_an_export_is_found_again_in_a_folder_of_the_user_alone(cache: Path) -> None:
    assert find("a") is None
    add("a")
    assert find("a") == FILES
    assert find("b") is None
    assert cache.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_can_write_is_not_used(cache: Path) -> None:
    add("a")
    cache.chmod(0o777)
    assert find("a") is None


def test_a_link_is_not_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    add("a")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_cache_without_a_folder(cache: Path) -> None:
    cache.parent.write_text("a file in the way")
    add("a")
    assert find("a") is None


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18)])
def test_a_damaged_export_is_ignored_and_replaced(cache: Path, content: bytes) -> None:
    add("a")
    (cache / "a.zip").write_bytes(content)
    assert find("a") is None
    add("a")
    assert find("a") == FILES


def test_a_changed_byte_is_found(cache: Path) -> None:
    add("a")
    file = cache / "a.zip"
    file.write_bytes(file.read_bytes().replace(b"graph", b"grapf", 1))
    assert find("a") is None


def test_the_least_recently_used_exports_are_deleted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add("a")
    monkeypatch.setattr(graph_cache, "LIMIT", 2 * (cache / "a.zip").stat().st_size)
    for age, key in enumerate("ab"):
        add(key)
        os.utime(cache / f"{key}.zip", (age, age))
    assert find("a") == FILES  # now b was used the longest time ago
    add("c")
    assert {path.stem for path in cache.glob("*.zip")} == {"a", "c"}


def test_the_key_depends_on_architecture_example_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    key = graph_cache.cache_key("cnn", b"example")
    assert key == graph_cache.cache_key("cnn", b"example")
    assert key != graph_cache.cache_key("resnet", b"example")
    assert key != graph_cache.cache_key("cnn", b"other")
    monkeypatch.setattr(graph_cache, "version", lambda name: "0")
    assert key != graph_cache.cache_key("cnn", b"example")


def test_other_weights_are_put_into_a_graph_of_torch(tmp_path: Path) -> None:
    first, second = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval() for _ in range(2))
    second[1].running_mean.add_(1)
    example = (torch.zeros(2, 3),)
    torch.export.save(torch.export.export(first, example), tmp_path / "first.pt2")
    (tmp_path / "second.pt2").write_bytes(graph_cache.with_weights((tmp_path / "first.pt2").read_bytes(), second.state_dict()))
    values = torch.rand(2, 3)
    loaded = torch.export.load(tmp_path / "second.pt2").module()
    torch.testing.assert_close(loaded(values), second(values))
    with zipfile.ZipFile(tmp_path / "second.pt2") as archive:
        assert archive.testzip() is None
    with pytest.raises(ValueError, match=r"0\.weight"):
        graph_cache.with_weights((tmp_path / "first.pt2").read_bytes(), second.state_dict() | {"0.weight": torch.zeros(1)})
