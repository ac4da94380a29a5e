"""Entry point: what has been recorded and how it stands: python -m mnist_exp.runs list | reap | rerun RUN_ID."""

import argparse
import os
import sys
from pathlib import Path

from mnist_exp import HOME
from mnist_exp.command_line import safe_output
from mnist_exp.console import show_jobs
from mnist_exp.errors import UserError
from mnist_exp.overrides import default_store
from mnist_exp.tracking import MLflowTracker, Record, read_runs


def main() -> None:
    """Parse the command line and answer; a user's mistake ends with a message and status 1."""
    parser = argparse.ArgumentParser(prog="python -m mnist_exp.runs", description=__doc__)
    parser.add_argument("--experiment", default="mnist_exp", help="the MLflow experiment, mnist_exp unless told")
    parser.add_argument("--output-dir", type=Path, default=HOME / "outputs", help="where the runs' checkpoints lie")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show sweeps, their jobs, and single runs, the newest last")
    commands.add_parser("reap", help="set to KILLED what is RUNNING in the store though its process is dead")
    again = commands.add_parser("rerun", help="run again what MLflow holds of a run, and compare")
    again.add_argument("run_id")
    arguments = parser.parse_args()
    if arguments.command == "rerun":
        os.execv(sys.executable, [sys.executable, "-m", "mnist_exp.run", f"rerun={arguments.run_id}"])
    with safe_output():
        try:
            show(arguments.command, arguments.experiment, arguments.output_dir)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(1)


def show(command: str, experiment: str, output_dir: Path) -> None:
    """Reap, and list the runs if that is the command; raises UserError."""
    tracker = MLflowTracker(os.environ.get("MLFLOW_TRACKING_URI", default_store()), experiment)
    reaped = tracker.reap(output_dir)
    for record in reaped:
        print(f"{record.run_id} ({record.name}): its process is dead, now KILLED")
    if command == "reap":
        print(f"{len(reaped)} reaped")
        return
    records = read_runs(tracker.client, tracker.experiment_id)[::-1]
    children = [record for record in records if "sweep_id" in record.tags]
    rows = []
    for record in records:
        if "sweep_id" in record.tags:
            continue
        rows.append(row(record.name, record))
        own = [child for child in children if child.tags["sweep_id"] == record.run_id]
        rows += [row(f"  {child.name}", child) for child in sorted(own, key=lambda child: child.job or 0)]
    show_jobs(rows)


def row(name: str, record: Record) -> dict[str, str]:
    """Return what is shown of a run."""
    metrics = {key: f"{record.metrics[key]:.2%}" if key in record.metrics else "" for key in ("val/accuracy", "test/accuracy")}
    return {"run": record.run_id, "name": name, "status": record.status, **metrics}


if __name__ == "__main__":
    main()
