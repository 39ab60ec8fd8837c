"""Padded batches of token sequences. Padding is by length, since many models pad with their end token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100  # the label of a token that is not trained
# What a chat template may raise on a conversation that it does not accept. transformers runs it in jinja2's sandbox,
# which itself raises TemplateErrors, or an OverflowError for a range that is too long.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError),
    *(RecursionError, MemoryError),
)


class Batch(NamedTuple):
    """Right-padded sequences: ids and mask (b, t), labels (b, t) with IGNORED where a token does not count.

    Statistics count each token `weight` times. `slope` is how the objective changes with the loss of a token, up to its
    sign: 1 if it is the sum of these losses. `greedy` says that the tokens that count are the model's most likely ones,
    which should stay so.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weight: float = 1.0
    slope: float = 1.0
    greedy: bool = False

    @property
    def loss_positions(self) -> Tensor:
        """Positions whose next token counts, (b, t) bool: losses and statistics are those of the predictions there."""
        counted = self.labels != IGNORED
        return torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)

    @property
    def targets(self) -> Tensor:
        """The tokens that count, (n,), in the order of `loss_positions`."""
        labels = self.labels[:, 1:]
        return labels[labels != IGNORED]


def count_predicted(text: Sequence[Batch]) -> int:
    """Return the number of predictions of a text that count."""
    return sum(int(batch.loss_positions.sum()) for batch in text)


def count_labelled(text: Sequence[Batch]) -> int:
    """Return the number of tokens of a text that count: all of them in text that is read as a whole."""
    return sum(int((batch.labels != IGNORED).sum()) for batch in text)


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Cut generated tokens after the first end token, which padding may follow."""
    end = next((position for position, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: end + 1])


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens at which a model stops generating."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def count_tokens(text: Sequence[Batch]) -> int:
    """Return the number of tokens of a text, without padding."""
    return sum(int(batch.attention_mask.sum()) for batch in text)


def generation_inputs(prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """Return inputs of `generate` for prompts of any lengths: ids and mask (b, t), left-padded, and the padding token.

    A tokenizer without a padding token, as those of Llama 2 and Mistral, pads with its end token.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # generation continues at the right edge
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "pad_token_id": pad}


def batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int | Callable[[int], int],
    device: torch.device,
    labels: Sequence[Sequence[int]] | None = None,
    sort: bool = True,
) -> Iterator[Batch]:
    """Yield sequences in batches, longest first: there is little padding, and memory runs out at once or never.

    Args:
        batch_size: sequences per batch, or a function of their length.
        sort: if False, sequences stay in their order.
    """
    labels = labels if labels is not None else sequences
    order = list(range(len(sequences)))
    if sort:
        order.sort(key=lambda index: -len(sequences[index]))
    while order:
        size = batch_size if isinstance(batch_size, int) else batch_size(len(sequences[order[0]]))
        chosen, order = order[:size], order[size:]
        width = max(len(sequences[index]) for index in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        targets = torch.full((len(chosen), width), IGNORED)
        for row, index in enumerate(chosen):
            length = len(sequences[index])
            ids[row, :length] = torch.tensor(sequences[index])
            mask[row, :length] = 1
            targets[row, :length] = torch.tensor(labels[index])
        yield Batch(ids.to(device), mask.to(device), targets.to(device))


def decoded(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Decode one sequence; `decode` also takes batches, so its type says nothing of the result."""
    return cast(str, tokenizer.decode(cast("list[int]", ids), skip_special_tokens=skip_special_tokens))


def added_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens that were added to the vocabulary, with their ids."""
    return cast(PreTrainedTokenizerFast, tokenizer).get_added_vocab()


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a plain text with the tokens that the tokenizer puts before texts, and without an end token.

    Some tokenizers also add a token at the end of every text, after which a model would generate nothing.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return added_at_the_start(tokenizer, ids) + ids


def added_at_the_start(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the tokens that the tokenizer puts before texts, unless `ids` already begin with them."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    first = list(whole[:place])
    return [] if list(ids[: len(first)]) == first else first
