"""From the runs of a sweep to an answer."""
