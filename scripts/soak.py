"""Make many short runs and watch what they leave: memory, open files, statuses, the database.

    python scripts/soak.py [--runs 500] [--processes 1]

Each process is the real command line with a Hydra sweep over seeds on `digits`; all write to one new SQLite store. Every 10
seconds the memory and the open files of each are noted. At the end every run must be FINISHED, the database must pass
`PRAGMA integrity_check`, and memory and files must not have grown between the first fifth of the time and the last.
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
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient

RECIPE = ["hydra/launcher=basic", "data=digits", "~phases.train", "phases.finetune.epochs=1"]  # basic: all in one process


def usage(pid: int) -> tuple[float, int]:
    """Return the MiB of memory and the number of open files of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> None:
    """Parse the command line, make the runs, print what was seen; status 1 if something was lost or grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    share = arguments.runs // arguments.processes
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
        if arguments.processes > 1:
            environment["OMP_NUM_THREADS"] = "1"
        processes = []
        for number in range(arguments.processes):
            seeds = f"seed=range({number * share},{(number + 1) * share})"
            command = [sys.executable, "-m", "mnist_exp.run", "-m", *RECIPE, seeds, f"output_dir={folder}/outputs"]
            with (Path(folder) / f"{number}.err").open("wb") as errors:
                processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors))
        began = time.monotonic()
        seen: dict[int, list[tuple[float, int]]] = {process.pid: [] for process in processes}
        while any(process.poll() is None for process in processes):
            time.sleep(10)
            for process in processes:
                if process.poll() is None:
                    seen[process.pid].append(usage(process.pid))
        seconds = time.monotonic() - began

        runs = []
        client, token = MlflowClient(f"sqlite:///{database}"), None
        while token is not None or not runs:
            page = client.search_runs(["1"], max_results=1000, page_token=token)
            runs += page
            token = page.token
        statuses = Counter(run.info.status for run in runs)
        with closing(sqlite3.connect(database)) as connection:
            (intact,) = connection.execute("PRAGMA integrity_check").fetchone()
        said = "\n".join(path.read_text()[-2000:] for path in sorted(Path(folder).glob("*.err")))

    print(
        f"{len(runs)} runs in {seconds:.0f} s by {arguments.processes} process(es): {dict(statuses)}; integrity_check: {intact}"
    )
    grew = False
    for number, samples in enumerate(seen.values()):
        fifth = max(1, len(samples) // 5)
        # The first sample is of a process that still imports.
        early, late = samples[1 : 1 + fifth], samples[-fifth:]
        memory = [statistics.median(sample[0] for sample in part) for part in (early, late)]
        files = [statistics.median(sample[1] for sample in part) for part in (early, late)]
        print(f"  process {number}: memory {memory[0]:.0f} -> {memory[1]:.0f} MiB, open files {files[0]:.0f} -> {files[1]:.0f}")
        grew |= memory[1] > memory[0] * 1.1 or files[1] > files[0] + 2
    failed = any(process.returncode for process in processes) or statuses != {"FINISHED": share * arguments.processes}
    if failed or grew or intact != "ok":
        sys.exit(f"lost, broken or grown:\n{said}")


if __name__ == "__main__":
    main()
