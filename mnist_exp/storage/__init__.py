"""Files on disk: run folders and checkpoints."""
