"""Export of a run: adapter files, merged models with verification, GGUF, uploads, model cards."""
