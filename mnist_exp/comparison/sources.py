"""The runs of a sweep in a store, as the source of a comparison."""

from mnist_exp.comparison.arms import Source
from mnist_exp.overrides import split_override
from mnist_exp.tracking.base import RunRecord, Store
from mnist_exp.tracking.definition import Definition


def source_of(store: Store, parent: RunRecord, definition: Definition) -> Source:
    """Return the runs of a sweep as a source of a comparison."""
    jobs = {job.number: dict(split_override(override) for override in job.overrides) for job in definition.jobs}
    return Source(parent.run_id, store.children(parent.run_id), jobs, definition.initial, definition.plan)
