"""Many runs: grids, searches, parallel workers, and the summary of their results."""
