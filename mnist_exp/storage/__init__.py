"""Files on disk: run folders, checkpoints, manifests."""
