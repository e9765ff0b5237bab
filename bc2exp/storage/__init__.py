"""Writing that survives a kill: atomic files and folders, locks, tensors with checksums."""
