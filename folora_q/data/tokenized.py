"""Tokenize a whole dataset, record what was left out, and cache the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from folora_q.data.encode import Encoder
from folora_q.data.examples import Example, Text, content_of
from folora_q.data.pairs import DESIRABLE, FIRST, MISMATCHED, REJECTED, mismatched
from folora_q.data.pieces import Encoded
from folora_q.data.rows import RowError
from folora_q.errors import UserError
from folora_q.storage.files import cache_folder, commit_directory

# Increased when the same settings give other tokens.
FORMAT = 2
IDS = ListOf(Value("int32"))
FEATURES = Features({**dict.fromkeys(FIRST, IDS), "example": Value("int32")})
# Of pairs, whose chosen answers are in the first columns, and of labelled answers.
FURTHER = Features({**dict.fromkeys((*REJECTED, *MISMATCHED), IDS), DESIRABLE: Value("bool")})
COUNTS = "counts.json"


@dataclass(frozen=True)
class UnfitExamples:
    """What to do with examples that cannot be used as they are.

    Attributes:
        max_length: the maximum number of tokens in a sequence.
        overlong: `data.overlong`, for examples of more than max_length tokens.
        skip_errors: leave out and count examples on which the chat template fails, instead of raising.
    """

    max_length: int
    overlong: str
    skip_errors: bool = False


@dataclass
class Counts:
    """What happened to the examples.

    Attributes:
        examples, sequences: the number of examples, and of sequences that are left to train on; a pair counts once.
        tokens, trained: the number of tokens in the sequences, and of trained ones among them; without mismatched ones.
        overlong: examples longer than max_length.
        dropped, cut, split: what happened to these.
        untrained: sequences without a trained token, which are left out.
        longest: the longest sequence before anything was cut.
        given: answers without a thought for which the template's empty thought is not trained.
        refused: indices of examples on which the chat template failed, with the reason.
    """

    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    overlong: int = 0
    dropped: int = 0
    cut: int = 0
    split: int = 0
    untrained: int = 0
    longest: int = 0
    given: int = 0
    refused: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenized:
    """Sequences to train or to evaluate on.

    Attributes:
        sequences: columns `input_ids`, `labels`, and `example`, the index of the example that each comes from; of pairs
            and labelled answers also those of `folora_q.data.pairs`.
        folder: where they are cached.
        from_cache: whether they were found there.
    """

    sequences: Dataset
    counts: Counts
    folder: Path
    from_cache: bool


def tokenize(
    examples: Sequence[Example],
    encoder: Encoder,
    unfit: UnfitExamples,
    kind: str = "training",
    on_progress: Callable[[int], None] = lambda examples: None,
) -> Tokenized:
    """Encode all examples, or load them from the cache, whose key covers everything that they depend on.

    Args:
        kind: what the examples are, for messages: training or held-out.

    Raises:
        RowError: the template fails on an example.
        UserError: an example is too long (`overlong: raise`), or nothing is left to train on.
    """
    settings = unfit.max_length, unfit.overlong, unfit.skip_errors
    digest = hashlib.sha256(json.dumps([FORMAT, encoder.key(), *settings]).encode())
    for example in examples:
        digest.update(content_of(example).encode("utf-8", "surrogatepass") + b"\n")
    folder = cache_folder() / "tokenized" / digest.hexdigest()[:24]
    if folder.exists():
        on_progress(len(examples))
        counts = Counts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))
        return Tokenized(Dataset.load_from_disk(folder), counts, folder, from_cache=True)

    counts = Counts(examples=len(examples))
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for index, example in enumerate(examples):
        try:
            encoded = encoder(example)
        except RowError as error:
            if not unfit.skip_errors:
                raise
            counts.refused.append((index, error.reason))
            encoded = []
        counts.given += sum(each.given for sequence in encoded for each in sequence.sequences)
        for sequence in _fitted(example, encoded, unfit, counts):
            columns["example"].append(index)
            _add(columns, sequence)
            counts.tokens += sum(len(each.input_ids) for each in sequence.sequences)
            counts.trained += sum(each.trained for each in sequence.sequences)
        on_progress(1)
    counts.sequences = len(columns["example"])
    if not counts.sequences:
        longer = f"raise training.max_length to {counts.longest} or more, " if counts.dropped else ""
        raise UserError(
            _nothing_left(examples, counts, unfit.max_length, kind), f"{longer}look at them with `folora-q preview`"
        )
    if DESIRABLE in columns:
        columns |= _mismatched(columns, unfit.max_length, kind)
    with commit_directory(folder, keeps_existing=True) as staging:
        features = Features({name: feature for name, feature in (FEATURES | FURTHER).items() if name in columns})
        made = Dataset.from_dict(columns, features=features)
        made.save_to_disk(staging)
        (staging / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return Tokenized(Dataset.load_from_disk(folder), counts, folder, from_cache=False)


def _add(columns: dict[str, list], sequence: Encoded) -> None:
    """Append a row to the columns of tokens, labels and, if it has one, its own label."""
    if sequence.desirable is not None:
        columns.setdefault(DESIRABLE, []).append(sequence.desirable)
    for names, each in zip((FIRST, REJECTED), sequence.sequences, strict=False):
        for name, values in zip(names, (each.input_ids, each.labels), strict=True):
            columns.setdefault(name, []).append(np.asarray(values, np.int32))


def _mismatched(columns: Mapping[str, list], max_length: int, kind: str) -> dict[str, list]:
    """Return the columns of labelled answers that hold each prompt with the answer of another row."""
    ids, labels = (columns[name] for name in FIRST)
    if len(ids) < 2:
        raise UserError(
            f"training.objective: kto needs at least two {kind} rows, since it compares an answer with that of another",
            "add rows, or check what data.overlong and data.on_error leave out",
        )
    made: Iterable[tuple[str, list]] = zip(MISMATCHED, mismatched(ids, labels, max_length), strict=True)
    return dict(made)


def _fitted(example: Example, encoded: Sequence[Encoded], unfit: UnfitExamples, counts: Counts) -> Iterator[Encoded]:
    """Yield the sequences of one example that can be trained on."""
    for sequence in encoded:
        length = max(len(each.input_ids) for each in sequence.sequences)
        counts.longest = max(counts.longest, length)
        parts = [sequence]
        if length > unfit.max_length:
            counts.overlong += 1
            parts = _shortened(example, sequence, unfit, counts)
        for part in parts:
            if all(each.trained for each in part.sequences):
                yield part
            else:
                counts.untrained += 1


def _shortened(example: Example, sequence: Encoded, unfit: UnfitExamples, counts: Counts) -> list[Encoded]:
    max_length = unfit.max_length
    length = max(len(each.input_ids) for each in sequence.sequences)
    too_long = f"{example.where} has {length} tokens, more than training.max_length ({max_length})"
    match unfit.overlong:
        case "raise":
            raise UserError(too_long, "raise training.max_length, or set data.overlong to drop or truncate")
        case "drop":
            counts.dropped += 1
            return []
        case "truncate":
            counts.cut += 1
            return [sequence.cut(max_length)]
    if not isinstance(example, Text):
        raise UserError(
            f"{too_long}, and data.overlong: split is for plain text", "set data.overlong: drop or truncate"
        )
    counts.split += 1
    return [
        Encoded(sequence.input_ids[start : start + max_length], sequence.labels[start : start + max_length])
        for start in range(0, length, max_length)
    ]


def _nothing_left(examples: Sequence[Example], counts: Counts, max_length: int, kind: str) -> str:
    reasons = []
    if counts.dropped:
        reasons.append(
            f"{counts.dropped} are longer than training.max_length ({max_length}; the longest: {counts.longest})"
        )
    if counts.untrained:
        reasons.append(f"in {counts.untrained} no token would be trained")
    if counts.refused:
        index, reason = counts.refused[0]
        reasons.append(f"{len(counts.refused)} cannot be used; the first is {examples[index].where}: {reason}")
    return f"none of the {counts.examples} {kind} examples can be used: {', '.join(reasons)}"
