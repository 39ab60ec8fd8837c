"""Find token ids in a run's rows that exceed the embedding, before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pyarrow.compute as pc
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.pairs import columns_of
from folora_q.data.task_data import TaskTokens
from folora_q.data.tokenized import Tokenized
from folora_q.errors import UserError
from folora_q.preflight.model import no_row


def require_rows(data: TaskTokens, tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """Check that the embedding has a row for every token of the run's data.

    Raises:
        UserError: it has none for a token of the data, or for the padding token.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    padding = cast(int | None, tokenizer.pad_token_id)
    if padding is not None and padding >= rows:
        raise UserError(f"batches are padded, but {no_row({padding: str(tokenizer.pad_token)}, rows)}")
    for half, examples in ((data.train, data.task.train), (data.heldout, data.task.heldout)):
        if (place := _first_beyond(half, rows)) is not None:
            example, number = place
            token = str(tokenizer.convert_ids_to_tokens(number))
            raise UserError(f"{examples[example].where}: {no_row({number: token}, rows)}")


def _first_beyond(half: Tokenized, rows: int) -> tuple[int, int] | None:
    """Return example and id of the first token beyond the embedding's rows."""
    for name, _ in columns_of(half.sequences.column_names, trained=True):
        ids = half.sequences.data.column(name)
        largest = pc.call_function("max", [pc.call_function("list_flatten", [ids])]).as_py()
        if (largest or 0) < rows:
            continue
        for row in cast(Iterable[dict[str, Any]], half.sequences):
            for number in row[name]:
                if number >= rows:
                    return row["example"], number
    return None
