"""Make many short runs and watch what they leave: memory, open files, statuses, the database.

    python scripts/soak.py [--runs 500] [--processes 1]

The real command line sweeps over seeds on `digits`, in as many worker processes, into a new SQLite store. Every 10 seconds the
memory and the open files of each process are noted. At the end every run must be FINISHED, the database must pass
`PRAGMA integrity_check`, and neither may have grown by more than a tenth between the second fifth of the time and the last,
by the median over the workers, which are renewed now and then.
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
    with tempfile.TemporaryDirectory() as folder:
        database, errors = Path(folder) / "mlflow.db", Path(folder) / "errors"
        command = [sys.executable, "-m", "mnist_exp.run", *RECIPE, f"seed=range(0,{arguments.runs})"]
        command += [f"output_dir={folder}/outputs", f"hydra.launcher.processes={arguments.processes}"]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
        with errors.open("wb") as said:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        began = time.monotonic()
        seen: dict[str, list[tuple[float, int]]] = {"parent": [], "worker": []}
        while process.poll() is None:
            time.sleep(10)
            for pid in [process.pid, *workers(process.pid)]:
                with suppress(OSError):
                    seen["parent" if pid == process.pid else "worker"].append(usage(pid))
        seconds = time.monotonic() - began
        with closing(sqlite3.connect(database)) as connection:
            (intact,) = connection.execute("PRAGMA integrity_check").fetchone()
            statuses = Counter(status for (status,) in connection.execute("SELECT status FROM runs"))
        last_words = errors.read_text()[-2000:]

    print(f"{arguments.runs} runs in {seconds:.0f} s by {arguments.processes} process(es); with the parent: {dict(statuses)}")
    print(f"  integrity_check: {intact}")
    grew = False
    for name, samples in seen.items():
        fifth = max(1, len(samples) // 5)
        early, late = samples[fifth : 2 * fifth], samples[-fifth:]  # the first fifth warms up
        memory = [statistics.median(sample[0] for sample in part) for part in (early, late)]
        files = [statistics.median(sample[1] for sample in part) for part in (early, late)]
        print(f"  {name}: memory {memory[0]:.0f} -> {memory[1]:.0f} MiB, open files {files[0]:.0f} -> {files[1]:.0f}")
        grew |= memory[1] > memory[0] * 1.1 or files[1] > files[0] * 1.1 + 1
    if process.returncode or grew or intact != "ok" or statuses != {"FINISHED": arguments.runs + 1}:
        sys.exit(f"lost, broken or grown:\n{last_words}")


if __name__ == "__main__":
    main()
