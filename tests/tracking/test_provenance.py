"""What is recorded of the code: its digest, and a checkout that differs from its commit. And what never is."""

import subprocess
from pathlib import Path

import pytest

from mnist_exp import paths
from mnist_exp.tracking.provenance import MAX_PATCH, changed_files, code_digest, git_tags, software, uncommitted
from mnist_exp.tracking.tags import DIRTY

SECRET = "hunter2hunter2"


def git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", repository, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "mnist_exp").mkdir(parents=True)
    for name in ("mnist_exp/run.py", "notes.txt", "server.key", "analysis.ipynb", "deploy/Credentials/token.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first\n")
    git(folder, "init")
    git(folder, "add", "--all")
    git(folder, "commit", "-m", "first")
    return folder


def test_changes_and_new_source_files_are_recorded(repository: Path) -> None:
    (repository / "mnist_exp" / "run.py").write_text("second\n")
    (repository / "mnist_exp" / "new [1].py").write_text("new\n")
    patch = uncommitted(repository)
    assert "+second" in patch
    assert "+new" in patch
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    assert '?? "mnist_exp/new [1].py"' in changed_files(repository), "the user's own index is left alone"


@pytest.mark.parametrize(
    "name",
    ["server.key", ".env", ".env.py", "mnist_exp/.ENV", "id_rsa", "tests/id_ed25519", "aws_credentials.yaml",
     "deploy/Credentials/token.txt", "conf/cert.pem", "data.csv", "scripts/dump.bin"],
)  # fmt: skip
def test_secrets_and_data_are_named_only(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text(f"{SECRET}\n")
    assert SECRET not in uncommitted(repository)
    assert name.partition("/")[0] in "".join(changed_files(repository))


def test_the_patch_is_bounded_and_can_be_applied(repository: Path) -> None:
    for number in range(4):
        (repository / "mnist_exp" / f"part{number}.py").write_text("x = 1\n" * 60_000)
    patch = uncommitted(repository)
    assert 0 < len(patch) <= MAX_PATCH
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    assert "".join(changed_files(repository)).count("part") == 4


def test_without_changes_there_is_nothing(repository: Path) -> None:
    assert (uncommitted(repository), changed_files(repository), git_tags(repository)[DIRTY]) == ("", [], "false")


@pytest.mark.parametrize(
    ("name", "dirty"),
    [("photo.jpg", "false"), ("my_layers.py", "false"), ("notes.txt", "true"), ("mnist_exp/new [1].py", "true"),
     ("conf/model/mine.yaml", "true")],
)  # fmt: skip
def test_tracked_files_and_new_ones_in_the_package_and_in_conf_make_a_run_dirty(repository: Path, name: str, dirty: str) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("second\n")
    assert git_tags(repository)[DIRTY] == dirty


def test_a_copy_inside_somebody_elses_checkout_records_nothing_of_it(repository: Path) -> None:
    (repository / "notes.txt").write_text("theirs\n")
    inner = repository / "mnist_exp"
    assert (uncommitted(inner), changed_files(inner), git_tags(inner)) == ("", [], {})


@pytest.mark.parametrize(
    ("target", "file", "counts"),
    [("my_layers.Net", "my_layers.py", True), ("my_package.nets.Net", "my_package/parts.py", True),
     ("my_layers.Net", "other.py", False), ("installed.Net", "site-packages/installed.py", False),
     ("missing.Net", "my_layers.py", False), ("", "my_layers.py", False)],
)  # fmt: skip
def test_the_digest_of_the_code_counts_modules_of_ones_own_that_targets_name(
    target: str, file: str, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = software()
    for name in ("conf/model", "modules/my_package", "modules/site-packages"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(f"_target_: {target}\n")
    paths.typed[paths.CONFIG_DIR] = str(tmp_path / "conf")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules" / "site-packages")
    source = tmp_path / "modules" / file
    source.write_text("first\n")
    before = software()
    source.write_text("second\n")
    code_digest.cache_clear()
    assert (software() != before) == (before != alone) == counts
