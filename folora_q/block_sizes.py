"""Sizes of the pieces that work is done in. The memory estimate counts with the same numbers."""

# Positions whose logits are in memory at once: 128 of a vocabulary of 128k in float32 are 64 MiB.
LOGIT_ROWS = 128
# Rows of the output layer's weight that are converted to float32 at a time: 4k of width 4,096 are 64 MiB.
HEAD_ROWS = 4_096
# Tokens of a training row that the statistics read at most: a backward pass over more would limit the context length.
STATISTICS_LENGTH = 2_048
# Tokens in a batch of the statistics on a GPU, where its memory allows that. More make no token faster.
STATISTICS_TOKENS = 8_192
# Tokens in a window of general text.
GENERAL_WINDOW = 256
# Tokens of a capability's prompt, about: a template with a system prompt and the descriptions of three tools.
KEPT_PROMPT = 512
