"""Checks of a run before anything heavy is imported: from config.json, tokenizer files and the recipe."""
