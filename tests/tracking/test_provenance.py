"""What is recorded of a checkout that differs from its commit, and what never is."""

import subprocess
from pathlib import Path

import pytest

from mnist_exp.tracking import provenance
from mnist_exp.tracking.provenance import MAX_PATCH, uncommitted

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
    patch, status = uncommitted(repository)
    assert "+second" in patch
    assert "+new" in patch
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    assert '?? "mnist_exp/new [1].py"' in status, "the user's own index is left alone"


@pytest.mark.parametrize(
    "name",
    ["server.key", ".env", ".env.py", "mnist_exp/.ENV", "id_rsa", "tests/id_ed25519", "aws_credentials.yaml",
     "deploy/Credentials/token.txt", "conf/cert.pem", "data.csv", "scripts/dump.bin"],
)  # fmt: skip
def test_secrets_and_data_are_named_only(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text(f"{SECRET}\n")
    patch, status = uncommitted(repository)
    assert SECRET not in patch
    assert name.partition("/")[0] in status


def test_the_patch_is_bounded_and_can_be_applied(repository: Path) -> None:
    for number in range(4):
        (repository / "mnist_exp" / f"part{number}.py").write_text("x = 1\n" * 60_000)
    patch, status = uncommitted(repository)
    assert 0 < len(patch) <= MAX_PATCH
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    assert status.count("part") == 4


def test_without_changes_there_is_nothing(repository: Path) -> None:
    assert uncommitted(repository) == ("", "")


def test_a_copy_inside_somebody_elses_checkout_records_nothing_of_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "notes.txt").write_text("theirs\n")
    inner = repository / "mnist_exp"
    assert uncommitted(inner) == ("", "")
    monkeypatch.setattr(provenance, "CHECKOUT", inner)
    provenance.git_tags.cache_clear()
    assert provenance.git_tags() == {}
    provenance.git_tags.cache_clear()
