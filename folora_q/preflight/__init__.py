"""What config.json, the tokenizer's files and the recipe can tell of a run before anything heavy is imported."""
