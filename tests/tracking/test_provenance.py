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
    patch, unrecorded = uncommitted(repository)
    assert "+second" in patch
    assert "+new" in patch
    assert unrecorded == ""
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    status = subprocess.run(["git", "-C", repository, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert '?? "mnist_exp/new [1].py"' in status, "the user's own index is left alone"


@pytest.mark.parametrize(
    "name",
    ["server.key", ".env", ".env.local", "mnist_exp/.ENV", "id_rsa", "tests/id_ed25519", "aws_credentials.yaml",
     "deploy/Credentials/token.txt", "conf/cert.pem", "notes.txt~", "data.csv", "scripts/dump.bin"],
)  # fmt: skip
def test_secrets_and_foreign_files_are_not_recorded(repository: Path, name: str) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text(f"{SECRET}\n")
    patch, unrecorded = uncommitted(repository)
    assert SECRET not in patch
    assert unrecorded.startswith(f"{name}\t15 bytes\t")
    if "untracked" in unrecorded:
        assert "sha256 fdea1645" in unrecorded


def test_a_large_notebook_and_a_large_file_are_named_only(repository: Path) -> None:
    (repository / "analysis.ipynb").write_text(SECRET * 10_000)
    (repository / "notes.txt").write_text(SECRET * 100_000)
    patch, unrecorded = uncommitted(repository)
    assert patch == ""
    assert "analysis.ipynb\t140000 bytes" in unrecorded
    assert "a notebook of more than 100,000 bytes" in unrecorded
    assert "notes.txt\t1400000 bytes" in unrecorded


def test_the_patch_is_bounded_and_says_what_it_leaves_out(repository: Path) -> None:
    for number in range(4):
        (repository / "mnist_exp" / f"part{number}.py").write_text("x = 1\n" * 60_000)
    patch, unrecorded = uncommitted(repository)
    assert len(patch) <= MAX_PATCH
    subprocess.run(["git", "-C", repository, "apply", "--check", "--reverse", "-"], input=patch, text=True, check=True)
    named = [line.split("\t")[0] for line in unrecorded.splitlines()]
    assert named
    assert all((f"{name} b/" in patch) != (name in named) for name in (f"mnist_exp/part{number}.py" for number in range(4)))


def test_gigabytes_of_untracked_data_are_not_read(repository: Path) -> None:
    with (repository / "huge.bin").open("wb") as sparse:
        sparse.truncate(2**40)
    patch, unrecorded = uncommitted(repository)
    assert patch == ""
    assert unrecorded.startswith(f"huge.bin\t{2**40} bytes\tsha256 -\t")


def test_a_copy_inside_somebody_elses_checkout_records_nothing_of_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "notes.txt").write_text("theirs\n")
    inner = repository / "mnist_exp"
    assert uncommitted(inner) == ("", "")
    monkeypatch.setattr(provenance, "CHECKOUT", inner)
    provenance.git_tags.cache_clear()
    assert provenance.git_tags() == {}
    provenance.git_tags.cache_clear()
