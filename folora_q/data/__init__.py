"""Training data: sources, file readers, row formats, chat rendering and labels, tokenized datasets."""
