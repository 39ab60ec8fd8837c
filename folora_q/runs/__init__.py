"""Run folders: files, lock, manifest and results."""
