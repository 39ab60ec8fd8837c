"""Text on which predictions should not change: model-generated text, packaged public text, and answers to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.tokens import Batch, count_labelled, count_predicted

# Openings of public-domain works by a dozen authors in four languages, and passages of other kinds (news, a recipe, a
# letter, tables, SQL, code in three languages) written for this file. Nothing is evaluated on it.
PUBLIC_TEXT = Path(__file__).with_name("public.txt")
WINDOW, MIN_WINDOW_TOKENS = 128, 16  # tokens


def penalty_text(parts: Sequence[tuple[Sequence[Batch], float]]) -> list[Batch]:
    """Return the text for Σp: texts with weights per labelled token, whose mean is 1.

    Args:
        parts: texts, and the share of each in the penalty; the shares add up to 1.
    """
    parts = [(text, share) for text, share in parts if share > 0]
    if len(parts) == 1:
        return list(parts[0][0])
    tokens = [count_labelled(text) for text, _ in parts]
    return [
        batch._replace(weight=share * sum(tokens) / count)
        for (text, share), count in zip(parts, tokens, strict=True)
        for batch in text
    ]


def with_earlier_tasks(penalty: Sequence[Batch], earlier: Sequence[Batch], share: float) -> list[Batch]:
    """Return the text for Σp with the rows of earlier tasks, weighted by the number of predictions that count in each.

    Args:
        share: the earlier tasks' share of the penalty. The mean weight of a prediction stays what it was.
    """
    if share == 0 or not earlier:
        return list(penalty)
    counts = [count_predicted(text) for text in (penalty, earlier)]
    return [
        batch._replace(weight=batch.weight * of * sum(counts) / count)
        for text, of, count in zip((penalty, earlier), (1 - share, share), counts, strict=True)
        for batch in text
    ]


def public_windows(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the packaged public text in windows of tokens, without a short last one."""
    ids = tokenizer(PUBLIC_TEXT.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return [window for window in windows if len(window) >= MIN_WINDOW_TOKENS]
