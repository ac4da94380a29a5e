"""Command: list recorded runs, reap dead ones, repeat one: python -m mnist_exp.runs list | reap | rerun RUN_ID."""

import argparse
import os
import sys
from pathlib import Path

from mnist_exp import HOME
from mnist_exp.cli import safe_output
from mnist_exp.console import plain, show_table
from mnist_exp.errors import UserError
from mnist_exp.overrides import default_store
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.tags import SWEEP


def main() -> None:
    """Parse the command line and run the command; a user's mistake ends with a message and status 1."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.runs", description=__doc__)
    parser.add_argument("--experiment", default="mnist_exp", help="the MLflow experiment (default: mnist_exp)")
    parser.add_argument("--output-dir", type=Path, default=HOME / "outputs", help="the folder of the runs' checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list sweeps, their jobs, and single runs, the newest last")
    commands.add_parser("reap", help="set runs to KILLED that are RUNNING in the store although their process is dead")
    rerun = commands.add_parser("rerun", help="repeat a recorded run and compare the metrics")
    rerun.add_argument("run_id")
    arguments = parser.parse_args()
    if arguments.command == "rerun":
        os.execv(sys.executable, [sys.executable, "-m", "mnist_exp.run", f"rerun={arguments.run_id}"])
    with safe_output():
        try:
            store = MLflowStore(os.environ.get("MLFLOW_TRACKING_URI", default_store()), arguments.experiment)
            reaped = store.reap(arguments.output_dir)
            for record in reaped:
                print(plain(f"{record.run_id} ({record.name}): its process is dead, now KILLED"))
            if arguments.command == "reap":
                print(f"{len(reaped)} reaped")
            else:
                show_table(table(store.runs()))
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(1)


def table(records: list[RunRecord]) -> list[dict[str, str]]:
    """Return runs, the newest first, as the rows of a table: the newest last, and jobs below their sweep."""
    children = [record for record in records if SWEEP in record.tags]
    rows = []
    for record in reversed(records):
        if SWEEP in record.tags:
            continue
        rows.append(row(record.name, record))
        jobs = [child for child in children if child.tags[SWEEP] == record.run_id]
        rows += [row(f"  {child.name}", child) for child in sorted(jobs, key=lambda child: child.job or 0)]
    return rows


def row(name: str, record: RunRecord) -> dict[str, str]:
    """Return a run as the row of a table."""
    metrics = {key: f"{record.metrics[key]:.2%}" if key in record.metrics else "" for key in ("val/accuracy", "test/accuracy")}
    return {"run": record.run_id, "name": name, "status": record.status, **metrics}


if __name__ == "__main__":
    main()
