"""Jobs of a sweep get GPUs in turn. The GPUs are fake: numbers in CUDA_VISIBLE_DEVICES, which a machine without any ignores."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from test_sweep import LONG, begin, parent_and_children

from mnist_exp.errors import UserError
from mnist_exp.sweep.workers import WorkerPool, cores

WITNESS = """
import os
from pathlib import Path
from mnist_exp.learning.callbacks import Callback

class Witness(Callback):
    def on_phase_start(self, *arguments, **more):
        with Path(os.environ["WITNESS"]).open("a") as file:
            file.write(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
"""


def add_witness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Add a callback that notes process and GPU of each job; return the arguments that choose it."""
    (folder / "witness.py").write_text(WITNESS)
    (folder / "conf" / "callbacks").mkdir(parents=True)
    (folder / "conf" / "callbacks" / "witness.yaml").write_text("witness:\n  _target_: witness.Witness\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("WITNESS", str(folder / "seen"))
    return "--config-dir", str(folder / "conf"), "callbacks@phases.finetune.callbacks=[witness]"


def seen_by(folder: Path) -> list[tuple[str, str]]:
    """Return process and GPU of each job."""
    return [(pid, gpu) for pid, gpu in (line.split(" ") for line in (folder / "seen").read_text().splitlines())]


@pytest.mark.parametrize(
    ("gpus", "visible", "processes", "device", "expected"),
    [
        ("all", None, None, "auto", ["0", "1", "2"]),
        ("all", "4,7,GPU-9", None, "auto", ["4", "7", "GPU-9"]),
        ("none", None, 2, "auto", ["", ""]),
        ([0, 2], None, None, "auto", ["0", "2"]),
        ([0, 2], None, 4, "cuda", ["0", "2", "0", "2"]),
        ([0, 2], None, None, "cpu", [""] * cores()),
    ],
)
def test_the_gpu_of_each_process(
    gpus: Any, visible: str | None, processes: int | None, device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    config = OmegaConf.create({"device": device, "gpus": gpus})
    pool = WorkerPool(None, None, config, processes, config.gpus)  # type: ignore[arg-type]
    assert pool.gpus == expected
    assert pool.processes == len(expected)


@pytest.mark.parametrize("gpus", ["some", "0", [-1], ["a"], 1.5])
def test_a_mistake_is_explained(gpus: Any) -> None:
    config = OmegaConf.create({"gpus": gpus})
    with pytest.raises(UserError) as refused:
        WorkerPool(None, None, config, None, config.gpus)  # type: ignore[arg-type]
    assert refused.value.key == "hydra.launcher.gpus"


@pytest.mark.slow
def test_a_worker_that_replaces_a_dead_one_gets_its_gpu(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharing = ("hydra.launcher.processes=2", "hydra.launcher.gpus=[3,5]")
    process = begin(store, tmp_path, "-m", *add_witness(tmp_path, monkeypatch), *LONG[1:], *sharing, jobs=2)
    killed = parent_and_children(store)[1][0].tags["pid"]
    os.kill(int(killed), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1, error
    seen = seen_by(tmp_path)
    gpu_of = dict(seen)
    assert len(seen) == 4
    assert len(gpu_of) == 3, "each process keeps its GPU"
    assert Counter(gpu_of.values()) == {gpu_of[killed]: 2, ({"3", "5"} - {gpu_of[killed]}).pop(): 1}
