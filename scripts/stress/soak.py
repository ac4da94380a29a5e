"""Make many short runs and observe the memory, the open files, the statuses and the database.

    python scripts/stress/soak.py [--runs 500] [--processes 1]

The real command line sweeps over seeds on `digits` into a new SQLite store. Every 10 seconds the script reads the memory and the
open files of each process. At the end every run must be FINISHED, and the database must pass `PRAGMA integrity_check`. Neither
memory nor open files may have grown by more than a tenth between the second fifth of the time and the last. Medians over the
workers count, because workers are replaced from time to time.
"""

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

from kill_sweeps import workers

RECIPE = ["-m", "data=digits", "~phases.train", "phases.finetune.epochs=1"]
Samples = list[tuple[float, int]]  # MiB of memory, open files


def usage(pid: int) -> tuple[float, int]:
    """Return the MiB of memory and the number of open files of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def sample(process: subprocess.Popen[bytes]) -> dict[str, Samples]:
    """Read the usage of a sweep and its workers until the sweep ends."""
    samples: dict[str, Samples] = {"parent": [], "worker": []}
    while process.poll() is None:
        time.sleep(10)
        for pid in [process.pid, *workers(process.pid)]:
            with suppress(OSError):
                samples["parent" if pid == process.pid else "worker"].append(usage(pid))
    return samples


def has_grown(name: str, samples: Samples) -> bool:
    """Print the usage of a kind of process, early and late, and return whether it has grown."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]  # the first fifth is warm-up
    memory = [statistics.median(mib for mib, _ in part) for part in (early, late)]
    files = [statistics.median(count for _, count in part) for part in (early, late)]
    print(f"  {name}: memory {memory[0]:.0f} -> {memory[1]:.0f} MiB, open files {files[0]:.0f} -> {files[1]:.0f}")
    return memory[1] > memory[0] * 1.1 or files[1] > files[0] * 1.1 + 1


def main() -> None:
    """Parse the command line, make the runs, print the observations; status 1 if anything was lost or has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database, errors = Path(folder) / "mlflow.db", Path(folder) / "errors"
        command = [sys.executable, "-m", "mnist_exp.run", *RECIPE, f"seed=range(0,{arguments.runs})"]
        command += [f"output_dir={folder}/outputs", f"hydra.launcher.processes={arguments.processes}"]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
        started = time.monotonic()
        with errors.open("wb") as stderr:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        samples = sample(process)
        seconds = time.monotonic() - started
        with closing(sqlite3.connect(database)) as connection:
            (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
            statuses = Counter(status for (status,) in connection.execute("SELECT status FROM runs"))
        error = errors.read_text()[-2000:]

    print(f"{arguments.runs} runs in {seconds:.0f} s by {arguments.processes} process(es); with the parent: {dict(statuses)}")
    print(f"  integrity_check: {integrity}")
    grown = [name for name, usages in samples.items() if has_grown(name, usages)]
    if process.returncode or grown or integrity != "ok" or statuses != {"FINISHED": arguments.runs + 1}:
        sys.exit(f"lost, damaged or grown:\n{error}")


if __name__ == "__main__":
    main()
