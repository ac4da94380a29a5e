"""The same sweep on a Ray cluster and on SLURM, both real, both of this one machine."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CommandLine
from test_sweep import SHORT, parent_and_children

pytestmark = pytest.mark.cluster


@pytest.fixture
def ray() -> Iterator[str]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs pip install -e '.[ray]'")
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    head = ["--head", "--num-cpus", "2", "--disable-usage-stats", "--include-dashboard=false"]
    subprocess.run([*command, "start", *head], check=True, capture_output=True)
    yield "ray_cluster"
    subprocess.run([*command, "stop"], check=True, capture_output=True)


@pytest.fixture
def slurm() -> Iterator[str]:
    if importlib.util.find_spec("submitit") is None or shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs pip install -e '.[slurm]', Debian's slurmctld, slurmd, slurm-client and munge, and root")
    script = Path(__file__).with_name("one_node_slurm.sh")
    subprocess.run([script, "start"], check=True)
    yield "slurm"
    subprocess.run([script, "stop"], check=True)


@pytest.mark.parametrize("cluster", ["ray", "slurm"])
def test_a_sweep_on_a_cluster(
    cluster: str, request: pytest.FixtureRequest, command_line: CommandLine, store: str, tmp_path: Path
) -> None:
    launcher = request.getfixturevalue(cluster)
    done = command_line(*SHORT, f"hydra/launcher={launcher}", "model=se_cnn,plain_cnn")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [(child.name, child.status) for child in children] == [
        (f"{model} digits", "FINISHED") for model in ("se_cnn", "plain_cnn")
    ]
    assert {child.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert len(list((tmp_path / "outputs").glob("*/finished"))) == 2

    failing = command_line(*SHORT, f"hydra/launcher={launcher}", "phases.finetune.optimizer.lr=1e29", "seed=5,6")
    assert failing.returncode == 1
    assert "learning rate" in failing.stderr, "the reason of a job"
    assert "Traceback" not in failing.stderr
