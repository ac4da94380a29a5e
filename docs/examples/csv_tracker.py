"""A tracker of one's own: a folder for each run, with `run.json`, `metrics.csv` and the artifacts."""

import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

from matplotlib.figure import Figure

from mnist_exp.learning.data import Dataset
from mnist_exp.tracking import tags as names
from mnist_exp.tracking.base import Answer, RunInfo, RunRecord, Store, Tracker

RECORD, METRICS = "run.json", "metrics.csv"


class CsvStore(Store):
    """Runs in a folder, which is created if missing.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()

    def __str__(self) -> str:
        return str(self.folder)

    def start(self, info: RunInfo, run_id: str | None = None) -> "CsvTracker":
        if run_id is None:
            run_id, tags = uuid4().hex, {**info.tags, names.COMMAND: info.command}
            folder = self.folder / run_id
            folder.mkdir(parents=True)
            self.write(RunRecord(run_id, "", info.name, "RUNNING", now(), None, {}, {}, tags, {}, str(folder)))
        record = self.get_run(run_id)
        tags = {name: value for name, value in record.tags.items() if name not in names.OF_THE_END}
        self.write(replace(record, status="RUNNING", ended=None, tags=tags))
        return CsvTracker(self, run_id)

    def get_run(self, run_id: str) -> RunRecord:
        try:
            return RunRecord(**json.loads((self.folder / run_id / RECORD).read_text()) | {"run_id": run_id})
        except FileNotFoundError as error:
            raise self.missing(run_id) from error

    def runs(self, *, status: str = "", tag: str = "", prefix: str = "", everywhere: bool = False) -> list[RunRecord]:
        found = [self.get_run(file.parent.name) for file in self.folder.glob(f"{'[0-9a-f]' * 32}/{RECORD}")]
        chosen = [run for run in found if status in ("", run.status) and (not tag or tag in run.tags)]
        return sorted((run for run in chosen if run.run_id.startswith(prefix)), key=lambda run: -run.started)

    def points(self, record: RunRecord) -> dict[str, dict[int, float]]:
        points: dict[str, dict[int, float]] = {}
        text = self.read_artifacts([record], METRICS).get(record.run_id, b"").decode()
        for name, step, value in csv.reader(text.splitlines()):
            points.setdefault(name, {})[int(step)] = float(value)
        return points

    def read_artifacts(self, records: Sequence[RunRecord], path: str, *, strict: bool = False) -> dict[str, bytes]:
        files = {record.run_id: self.folder / record.run_id / path for record in records}
        return {run_id: file.read_bytes() for run_id, file in files.items() if file.exists()}

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.update(run_id, tags=tags)

    def set_status(self, run_id: str, status: str) -> None:
        self.write(replace(self.get_run(run_id), status=status, ended=now()))

    def delete(self, run_id: str) -> None:
        shutil.rmtree(self.folder / run_id)

    def publish(self, run_id: str, answer: Answer) -> str:
        self.set_tags(run_id, {f"{names.ANSWER}.{answer.factor}": f"{answer.title} ({answer.subtitle})"})
        shutil.copy(answer.picture, self.folder / run_id)
        return str(shutil.copy(answer.report, self.folder / run_id))

    def update(self, run_id: str, **added: Mapping[str, object]) -> None:
        """Add to the params, the metrics, the tags or the digests of a run."""
        record = self.get_run(run_id)
        self.write(replace(record, **{name: getattr(record, name) | dict(values) for name, values in added.items()}))

    def write(self, record: RunRecord) -> None:
        """Replace the record of a run at once, because other processes read it."""
        file = self.folder / record.run_id / RECORD
        file.with_suffix(".new").write_text(json.dumps(asdict(record), indent=1))
        file.with_suffix(".new").replace(file)


class CsvTracker(Tracker):
    """Records one run.

    Args:
        store: The store.
        run_id: The id of the run.
    """

    is_recording = True

    def __init__(self, store: CsvStore, run_id: str) -> None:
        super().__init__(run_id)
        self.store, self.folder = store, store.folder / run_id
        self.points = store.points(store.get_run(run_id))

    def end(self, status: str) -> None:
        self.flush()
        self.store.set_status(self.run_id, status)

    def log_params(self, params: Mapping[str, object]) -> None:
        self.store.update(self.run_id, params={name: str(value) for name, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.store.set_tags(self.run_id, tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.points.setdefault(name, {})[step] = value

    def flush(self) -> None:
        with (self.folder / METRICS).open("w", newline="") as file:
            rows = ((name, step, value) for name, points in self.points.items() for step, value in points.items())
            csv.writer(file).writerows(rows)
        self.store.update(self.run_id, metrics={name: points[max(points)] for name, points in self.points.items()})

    def log_text(self, text: str, path: str) -> None:
        (self.folder / path).write_text(text)

    def log_file(self, file: Path) -> None:
        shutil.copy(file, self.folder)

    def log_figure(self, figure: Figure, path: str) -> None:
        (self.folder / path).parent.mkdir(exist_ok=True)
        figure.savefig(self.folder / path)

    def log_dataset(self, data: Dataset, split: str, context: str) -> None:
        self.store.update(self.run_id, digests={split: data.splits[split].digest})


def now() -> int:
    """Return milliseconds since 1970."""
    return time.time_ns() // 10**6
