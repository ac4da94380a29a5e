"""Which runs may be compared: arms of one factor, their runs paired by seed and averaged over every other key that varied."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mnist_exp.comparison.statistics import Comparison, Verdict, compare, levels_differ
from mnist_exp.errors import UserError
from mnist_exp.metrics import metric_of
from mnist_exp.overrides import combinations, key_of, text_of
from mnist_exp.tracking.base import RunRecord, Store, Sweep

Jobs = Mapping[int, Mapping[str, str]]  # the overrides of each job by its number, as values by key
Block = tuple[tuple[str, str], ...]  # (key, value) of every key that varied except the factor, the seed included
EQUAL = ("code", "torch", "precision", "threads")  # tags and parameters in which all compared runs must agree
SEED = "seed"
DEFAULT = "default"  # the value of a key that a job does not set


@dataclass(frozen=True)
class Source:
    """The runs of a sweep, or of a table of runs.

    Args:
        name: The id of the sweep, or the path of the table.
        records: The runs.
        jobs: The jobs that the sweep defines.
        initial: The numbers of the jobs that were defined before the first job started.
    """

    name: str
    records: Sequence[RunRecord]
    jobs: Jobs
    initial: frozenset[int]


def source_of(store: Store, sweep: Sweep) -> Source:
    """Return the runs of a sweep as a source of a comparison."""
    records = [record for record in store.children(sweep.run_id) if record.job is not None]
    jobs = {record.job: record.overrides for record in records if record.job is not None}
    if sweep.sweeper != "grid":  # a search records what it has proposed
        return Source(sweep.run_id, records, _values(jobs), frozenset(jobs))
    first, *later = ([list(combination) for combination in combinations(grid)] for grid in sweep.grids)
    combined = map(list, dict.fromkeys(map(tuple, [*first, *itertools.chain(*later)])))
    missing = [job for job in combined if job not in jobs.values()]
    # Combinations that compose equal configurations are one job.
    jobs |= dict(zip((number for number in range(sweep.total) if number not in jobs), missing, strict=False))
    initial = frozenset(number for number, job in jobs.items() if job in first)
    return Source(sweep.run_id, records, _values(dict(sorted(jobs.items()))), initial)


def _values(jobs: Mapping[int, Sequence[str]]) -> Jobs:
    return {number: {key_of(item): text_of(item) for item in job} for number, job in jobs.items()}


@dataclass(frozen=True)
class Arms:
    """The finished runs of one or several sweeps, grouped by the value of one factor.

    Args:
        factor: The key whose values are compared.
        baseline: The value that the other arms are compared with.
        runs: The runs by arm, the baseline first, and by block.
        flags: One message for each run that is left out.
        seeds_known: Whether the seeds were chosen before any result was seen: else intervals must hold at any number of them.
        seeds_reason: The sentence that says why.
    """

    factor: str
    baseline: str
    runs: dict[str, dict[Block, RunRecord]]
    flags: list[str] = field(default_factory=list)
    seeds_known: bool = True
    seeds_reason: str = ""

    @property
    def others(self) -> list[str]:
        """The arms except the baseline."""
        return [arm for arm in self.runs if arm != self.baseline]

    @property
    def records(self) -> list[RunRecord]:
        """The runs of all arms."""
        return [record for runs in self.runs.values() for record in runs.values()]

    def pairs(self, arm: str) -> list[Block]:
        """Return the blocks that both `arm` and the baseline have a run in."""
        return sorted(self.runs[arm].keys() & self.runs[self.baseline].keys())

    def cells(self, arm: str) -> list[Block]:
        """Return the combinations of the other keys in which `arm` or the baseline has a run; one empty cell without any."""
        return sorted({cell_of(block) for block in self.runs[arm].keys() | self.runs[self.baseline].keys()})

    def seeds(self, arm: str) -> list[str]:
        """Return the seeds of which `arm` and the baseline have all cells, on one processor."""
        cells, shared = set(self.cells(arm)), set(self.pairs(arm))
        by_seed: dict[str, list[Block]] = {}
        for block in sorted(shared, key=_in_order):
            by_seed.setdefault(seed_of(block), []).append(block)
        return [
            seed
            for seed, blocks in by_seed.items()
            if {cell_of(block) for block in blocks} == cells and len(self.processors(arm, blocks)) == 1
        ]

    def processors(self, arm: str, blocks: Sequence[Block]) -> set[str]:
        """Return the processors of the runs of `arm` and the baseline in some blocks."""
        return {processor_of(self.runs[name][block]) for name in (arm, self.baseline) for block in blocks}

    def by_cell(self, arm: str, metric: str, seeds: Sequence[str]) -> dict[Block, list[float]]:
        """Return the values of `arm` in each cell, in the order of `seeds`."""
        found = {(cell_of(block), seed_of(block)): run.metrics[metric] for block, run in self.runs[arm].items()}
        cells = sorted({cell for cell, _ in found})
        return {cell: [found[cell, seed] for seed in seeds] for cell in cells if all((cell, seed) in found for seed in seeds)}

    def values(self, arm: str, metric: str, seeds: Sequence[str]) -> list[float]:
        """Return one value of `arm` per seed: the mean over its cells."""
        by_seed = zip(*self.by_cell(arm, metric, seeds).values(), strict=True)
        return [math.fsum(values) / len(values) for values in by_seed]


@dataclass(frozen=True)
class Row:
    """The comparison of one arm with the baseline in one metric.

    Args:
        values: The statistics of the pairs.
        margin: The smallest difference that matters, in recorded units; None without one.
    """

    metric: str
    arm: str
    baseline: str
    values: Comparison
    margin: float | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the metric is constant within both arms, as the number of parameters is."""
        return self.values.is_constant

    @property
    def verdict(self) -> Verdict:
        """What the interval says."""
        return self.values.verdict(self.margin)

    @property
    def is_detected(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.verdict in ("higher", "lower")


@dataclass(frozen=True)
class Level:
    """The difference of an arm from the baseline at one level of another key, and whether levels differ more than by chance."""

    arm: str
    key: str
    level: str
    difference: float
    differs: bool


def processor_of(record: RunRecord) -> str:
    """Return the processor of a run, and its GPU if it used one."""
    return " with ".join(record.tags[name] for name in ("cpu", "gpu") if name in record.tags) or "unknown processor"


def seed_of(block: Block) -> str:
    """Return the seed of a block, empty if the seed did not vary."""
    return dict(block).get(SEED, "")


def cell_of(block: Block) -> Block:
    """Return a block without its seed."""
    return tuple(item for item in block if item[0] != SEED)


def _in_order(block: Block) -> tuple[int, str, Block]:
    seed = seed_of(block)
    return (int(seed) if seed.isdecimal() and len(seed) < 19 else -1, seed, block)


def by_start(sources: Sequence[Source]) -> list[Source]:
    """Return sources in the order in which their first runs started."""
    return sorted(sources, key=lambda source: min((record.started for record in source.records), default=0))


def arrange(sources: Sequence[Source], factor: str | None, baseline: str | None) -> Arms:
    """Sort the runs of sweeps into arms.

    Args:
        sources: The sweeps or tables.
        factor: The key whose values are the arms; None selects the only key that varied besides the seed.
        baseline: The arm to compare with; None selects the first.

    Raises:
        UserError: The factor or the baseline does not exist, no arm has two seeds, or the runs do not belong together.
    """
    sources = by_start(sources)
    jobs = [job for source in sources for job in source.jobs.values()]
    keys = dict.fromkeys(key for job in jobs for key in job)
    varied = [key for key in keys if len({job.get(key) for job in jobs}) > 1]
    factor, values = _choose_factor(varied, jobs, factor)
    if baseline is not None and baseline not in values:
        raise UserError.invalid("--baseline", baseline, f"an arm of {factor}: {', '.join(values)}")
    baseline = values[0] if baseline is None else baseline
    known, reason = _seeds_known(sources, factor)
    arms = Arms(factor, baseline, {value: {} for value in (baseline, *values)}, [], known, reason)
    for source in sources:
        _add_runs(arms, source, varied)
    _check_agreement(arms, varied)
    _check_configuration(arms)
    _drop_arms_without_pairs(arms)
    _check_test_data(arms)
    _check_training_data(arms)
    return arms


def _seeds_known(sources: Sequence[Source], factor: str) -> tuple[bool, str]:
    """Return whether the values that are compared were chosen before the first result, and the sentence that says why.

    Arms that were added later do not change the values of the others, so the interval stays that of a fixed number of pairs.
    """
    first = sources[0]
    initial = [job for number, job in first.jobs.items() if number in first.initial]
    arms = {job.get(factor, DEFAULT) for job in initial}
    later = [
        job for source in sources for number, job in source.jobs.items() if source is not first or number not in first.initial
    ]
    changed = [job for job in later if job.get(factor, DEFAULT) in arms]
    seeds = {job.get(SEED, "") for source in sources for job in source.jobs.values()}
    added = seeds - {job.get(SEED, "") for job in initial}
    ended = {
        (source.name, record.job)
        for source in sources
        for record in source.records
        if record.is_done or record.status == "FAILED"
    }
    waiting = {
        job.get(SEED, "") for source in sources for number, job in source.jobs.items() if (source.name, number) not in ended
    }
    anytime = "so the interval is one that stays valid however often one looks; it is wider."
    if waiting:
        return False, f"Jobs of {len(waiting)} of {len(seeds)} seeds have not ended, {anytime}"
    if not changed:
        return True, "All seeds were defined before the first job, so the interval is that of a fixed number of pairs."
    if not added:
        return False, f"{len(changed)} jobs with other settings were added after the first job had started, {anytime}"
    text = f"{len(added)} of {len(seeds)} seeds were added after the first job had started"
    return False, f"{text}, {anytime}"


def _format_block(block: Block) -> str:
    return " ".join(f"{key}={value}" for key, value in block)


def _choose_factor(varied: list[str], jobs: Sequence[Mapping[str, str]], factor: str | None) -> tuple[str, list[str]]:
    """Return the factor and its values in the order of the jobs; raises UserError."""
    candidates = [key for key in varied if key != SEED]
    expected = f"expected a key that the sweep varied besides the seed: {', '.join(candidates) or 'none'}"
    if factor is None:
        if len(candidates) != 1:
            raise UserError(f"--factor is missing: {expected}.", key="--factor", remedy="Add --factor KEY.")
        factor = candidates[0]
    if factor not in candidates:
        reason = " Seeds pair the runs of the arms." if factor == SEED else ""
        raise UserError.invalid("--factor", factor, expected.removeprefix("expected "), reason.strip())
    return factor, list(dict.fromkeys(job.get(factor, DEFAULT) for job in jobs))


def _add_runs(arms: Arms, source: Source, varied: list[str]) -> None:
    """Add each finished run to its arm and block, and flag the other runs and the jobs without a run."""
    for record in sorted(source.records, key=lambda record: record.started):
        number = record.job
        if record.status != "FINISHED":
            arms.flags.append(f"unfinished: {record.name} is {record.status}")
        elif number is None or number not in source.jobs:
            arms.flags.append(f"unknown: {record.name} is not in the sweep's definition")
        else:
            job = source.jobs[number]
            block = tuple((key, job.get(key, "" if key == SEED else DEFAULT)) for key in varied if key != arms.factor)
            runs = arms.runs[job.get(arms.factor, DEFAULT)]
            if block in runs:
                arms.flags.append(f"duplicated: {record.name} ran more than once; the last run counts")
            runs[block] = record
    done = {record.job for record in source.records}
    for number, job in source.jobs.items():
        if number not in done:
            arms.flags.append(
                f"missing: job {number} ({_format_block(tuple((key, job[key]) for key in varied if key in job))}) has no run"
            )


def _check_agreement(arms: Arms, varied: Sequence[str]) -> None:
    """Raise UserError if runs differ in code, torch, precision or number of threads, unless the sweep varied it."""
    for name in (name for name in EQUAL if name not in varied):
        seen: dict[str, str] = {}
        for record in arms.records:
            value = record.params.get(name) if name == "precision" else record.tags.get(name)
            seen.setdefault(value or "unknown", record.name)
        if len(seen) > 1:
            found = "; ".join(f"{value}: {run}" for value, run in seen.items())
            raise UserError(f"The runs differ in {name} and cannot be compared: {found}. Repeat the runs of one of them.")


def _check_configuration(arms: Arms) -> None:
    """Raise UserError if the runs of an arm and a cell differ in more than the seed."""
    for arm, runs in arms.runs.items():
        seen: dict[Block, RunRecord] = {}
        for block, record in runs.items():
            other = seen.setdefault(cell_of(block), record)
            for key in sorted((record.params.keys() | other.params.keys()) - {SEED}):
                here, there = (item.params.get(key, "unset") for item in (record, other))
                if here != there:
                    raise UserError(
                        f"The runs of {arms.factor}={arm} differ in {key} and cannot be compared: {there} in {other.name}, "
                        f"{here} in {record.name}. Compare sweeps that share the configuration of this arm."
                    )


def _drop_arms_without_pairs(arms: Arms) -> None:
    """Flag unpaired runs and incomplete seeds, drop arms with fewer than two seeds; raises UserError if none remains."""
    for arm in arms.others:
        for block in sorted(arms.runs[arm].keys() ^ arms.runs[arms.baseline].keys()):
            alone, lacks = (arm, arms.baseline) if block in arms.runs[arm] else (arms.baseline, arm)
            run = f"{arms.factor}={alone} {_format_block(block)}"
            arms.flags.append(f"unpaired: {run} has no partner in {arms.factor}={lacks}")
        whole = set(arms.seeds(arm))
        for seed in dict.fromkeys(seed_of(block) for block in arms.pairs(arm)):
            if seed not in whole:
                blocks = [block for block in arms.pairs(arm) if seed_of(block) == seed]
                processors = arms.processors(arm, blocks)
                reason = f"ran on {' and '.join(sorted(processors))}" if len(processors) > 1 else "lacks runs of other settings"
                arms.flags.append(f"incomplete: seed {seed or 'of the sweep'} {reason} in {arm} and {arms.baseline}; left out")
    small = [arm for arm in arms.others if len(arms.seeds(arm)) < 2]
    if len(small) == len(arms.others):
        raise UserError(
            f"No arm of {arms.factor} has two seeds of finished runs with {arms.factor}={arms.baseline}, the minimum for an "
            "interval and a verdict. Sweep with 'seed=range(0,5)' or more, finish the sweep with sweep.resume=<its id>, or add "
            "seeds with sweep.extend=<its id> 'seed=range(0,5)'." + "".join(f"\n- {flag}" for flag in arms.flags)
        )
    for arm in small:
        count = len(arms.seeds(arm))
        arms.flags.append(f"left out: {arms.factor}={arm} has {count} seeds of finished runs; expected at least two")
        del arms.runs[arm]


def _check_test_data(arms: Arms) -> None:
    """Raise UserError if the runs were evaluated on different data."""
    seen: dict[tuple[str, str], str] = {}
    for record in arms.records:
        digest = record.digests.get("test") or record.digests.get("validation") or f"not recorded by {record.name}"
        seen.setdefault((record.data, digest), record.name)
    if len(seen) > 1:
        found = "; ".join(f"{data} ({digest}): {name}" for (data, digest), name in seen.items())
        raise UserError(f"The runs were evaluated on different data and cannot be compared: {found}. Sweep on one data set.")


def _check_training_data(arms: Arms) -> None:
    """Raise UserError if the runs of a pair were trained on different images, unless the data are what is compared."""
    if arms.factor.partition(".")[0] == "data":
        return
    for arm in arms.others:
        for block in arms.pairs(arm):
            run, other = (arms.runs[name][block] for name in (arm, arms.baseline))
            for split in sorted((run.digests.keys() & other.digests.keys()) - {"test", "validation"}):
                if run.digests[split] != other.digests[split]:
                    raise UserError(
                        f"The runs of a pair differ in the images of {split} and cannot be compared: {run.digests[split]} in "
                        f"{run.name}, {other.digests[split]} in {other.name}. Sweep with one data split."
                    )


def _check_validation_data(arms: Arms, metric: str) -> None:
    """Raise UserError if the runs of a pair were validated on different images."""
    for arm in arms.others:
        for block in arms.pairs(arm):
            pair = [arms.runs[name][block] for name in (arm, arms.baseline)]
            if len({record.digests.get("validation") or record.digests.get("finetune") for record in pair}) > 1:
                names = " and ".join(record.name for record in pair)
                raise UserError(
                    f"--metric {metric} is invalid: expected pairs with the same validation images, but {names} were validated "
                    "on different images. Compare test/accuracy, or sweep with one data split."
                )


def choose_metrics(arms: Arms, wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to compare: the wanted ones, or by default accuracy, loss, time and parameters.

    Raises:
        UserError: A run lacks a metric, or its value is not finite.
    """
    shared = sorted(set.intersection(*(set(record.metrics) for record in arms.records)))
    listed = ", ".join(shared) or "none"
    if wanted is None:
        split = "test" if "test/accuracy" in shared else "val"
        usual = (f"{split}/accuracy", f"{split}/loss", "time/train_seconds", "time/total_seconds", "model/parameters")
        wanted = [metric for metric in usual if metric in shared]
        if not wanted:
            raise UserError(f"--metric is missing: expected one of {', '.join(usual)} in every run. Choose from {listed}.")
    for metric in wanted:
        if metric not in shared:
            raise UserError.invalid("--metric", metric, f"a metric that every run has: {listed}")
        broken = [record.name for record in arms.records if not math.isfinite(record.metrics[metric])]
        if broken:
            raise UserError(
                f"--metric {metric} is invalid: expected finite values, but {len(broken)} of {len(arms.records)} runs, such as "
                f"{broken[0]}, have none. Compare another of {listed}, or sweep without the values that diverge."
            )
    return list(wanted)


def compare_arms(arms: Arms, metrics: Sequence[str], margin: float | None = None) -> list[Row]:
    """Compare every arm with the baseline in every metric.

    Args:
        arms: The runs by arm.
        metrics: The metrics.
        margin: The smallest difference that matters in the first metric, as displayed; None for the metric's own.

    Raises:
        UserError: `val/` metrics come from different images.
    """
    rows = []
    for position, metric in enumerate(metrics):
        if metric.startswith("val/"):
            _check_validation_data(arms, metric)
        definition = metric_of(metric)
        shown = margin if position == 0 and margin is not None else definition.margin
        smallest = None if shown is None else shown / definition.scale
        for arm in arms.others:
            seeds = arms.seeds(arm)
            ours, theirs = (arms.values(name, metric, seeds) for name in (arm, arms.baseline))
            values = compare(ours, theirs, tests=len(arms.others), anytime=not arms.seeds_known)
            rows.append(Row(metric, arm, arms.baseline, values, smallest))
    return rows


def compare_levels(arms: Arms, metric: str) -> list[Level]:
    """Return the difference of each arm at each level of every other key that varied, seeds aside; empty without such keys."""
    found = []
    for arm in arms.others:
        seeds = arms.seeds(arm)
        ours, theirs = (arms.by_cell(name, metric, seeds) for name in (arm, arms.baseline))
        for key in dict(next(iter(ours), ())):
            levels: dict[str, list[list[float]]] = {}
            for cell, values in ours.items():
                pairs = zip(values, theirs[cell], strict=True)
                levels.setdefault(dict(cell)[key], []).append([mine - other for mine, other in pairs])
            differences = {level: np.mean(cells, axis=0) for level, cells in levels.items()}
            differs = levels_differ(list(differences.values()))
            found += [Level(arm, key, level, float(values.mean()), differs) for level, values in differences.items()]
    return found


def differing_params(arms: Arms) -> dict[str, dict[str, str]]:
    """Return the parameters that differ between arms, as their values by arm."""
    table = {}
    for key in sorted({key for record in arms.records for key in record.params} - {SEED}):
        values = {arm: {record.params.get(key, "-") for record in runs.values()} for arm, runs in arms.runs.items()}
        by_arm = {arm: ", ".join(sorted(found)) for arm, found in values.items()}
        if len(set(by_arm.values())) > 1:
            table[key] = by_arm
    return table


def answer_metrics(arms: Arms, rows: Sequence[Row]) -> dict[str, float]:
    """Return the comparison as metrics of the sweep's parent, none of which has the name of a run's metric.

    Differences are in the unit in which the metric is displayed (accuracy: points), means as recorded. With one arm next to the
    baseline the names are `answer/difference`, ..., with several `answer/ARM/difference`, ...
    """
    found: dict[str, float] = {}
    for row in rows:
        values = row.values
        found[f"arm/{row.baseline}/{row.metric}"], found[f"arm/{row.arm}/{row.metric}"] = values.baseline_mean, values.mean
        if row.metric == rows[0].metric:
            name = "answer" if len(arms.others) == 1 else f"answer/{row.arm}"
            scale = metric_of(row.metric).scale
            ends = {"difference": values.difference, "low": values.interval.low, "high": values.interval.high}
            found |= {f"{name}/{key}": value * scale for key, value in ends.items()}
            found |= {f"{name}/p": values.p, f"{name}/n": float(values.n)}
    return {re.sub(r"[^\w\-. /:]", "_", name)[:200]: value for name, value in found.items() if math.isfinite(value)}
