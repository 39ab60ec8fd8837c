"""Tokenize rendered text in pieces, of which only the assistant's are trained."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.tokens import IGNORED, added_vocabulary, decoded

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One sequence: token ids, and labels that are IGNORED where nothing is trained.

    Attributes:
        given: the number of turns without a thought for which the template's empty thought is not trained.
        rejected: of a pair, the sequence with the other answer.
        desirable: of a labelled answer, whether it is desirable.
    """

    input_ids: list[int]
    labels: list[int]
    given: int = 0
    rejected: Encoded | None = None
    desirable: bool | None = None

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """The sequence, and the other one of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    def cut(self, length: int) -> Encoded:
        """Return it without the tokens after the first `length`."""
        rejected = None if self.rejected is None else self.rejected.cut(length)
        return Encoded(self.input_ids[:length], self.labels[:length], self.given, rejected, self.desirable)

    @property
    def trained(self) -> int:
        """The number of trained tokens; the first of a sequence is never trained, since nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Piece:
    """One turn in a rendered text.

    Attributes:
        text: the text up to the turn's end.
        start: where the trained part begins; everything before it is the prompt.
        marks: the spans that the template marks, if it has marks.
        given: whether the prompt contains the template's empty thought.
    """

    text: str
    start: int
    marks: list[Span] | None
    given: bool

    def learns(self, place: Span) -> bool:
        """Return whether a token is trained, given its span in the text."""
        marked = self.marks is None or any(inside(place, mark) for mark in self.marks)
        return inside(place, (self.start, len(self.text))) and marked


class PieceTokenizer:
    """Tokenizes pieces so that each prompt has the same tokens as when the model is prompted with it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added = frozenset(added_vocabulary(tokenizer).values())

    def __call__(self, pieces: list[Piece]) -> list[Encoded]:
        """Encode pieces each of which is a prefix of the one before it; the first has the complete text.

        Where a token would contain the end of a prompt and the start of its answer, the turn gets its own sequence, in
        which prompt and answer are tokenized separately.
        """
        text = pieces[0].text
        ids, places = self._tokens(text)
        fits = [self._is_cut_at(piece.start, text, ids, places) for piece in pieces]
        if not fits[0]:
            return [*(self(pieces[1:]) if len(pieces) > 1 else []), self._cut(pieces[0])]
        together = [piece for piece, fit in zip(pieces, fits, strict=True) if fit]
        apart = [self._cut(piece) for piece, fit in zip(pieces, fits, strict=True) if not fit]
        learned = _learned(together, places)
        joined = Encoded(ids, labels_of(ids, learned), sum(piece.given for piece in together))
        return [*reversed(apart), joined]

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(output["input_ids"]), output["offset_mapping"]

    def _is_cut_at(self, start: int, text: str, ids: list[int], places: list[Span]) -> bool:
        """Return whether the text up to `start` has the same tokens alone as in the complete text."""
        count = bisect_right(places, start, key=lambda place: place[1])
        if count < len(ids) and places[count][0] < start:
            return False
        # Added tokens split the text before anything else, so what precedes them is the same.
        first = next((index for index in range(count - 1, 0, -1) if ids[index] in self._added), 0)
        before = text[places[first][0] : start] if count else ""
        return self._tokens(before)[0] == ids[first:count]

    def _cut(self, piece: Piece) -> Encoded:
        """Encode a turn with prompt and answer tokenized separately, if they decode to the same text as together."""
        ids, places = self._tokens(piece.text)
        (prompt, before), (answer, behind) = map(self._tokens, (piece.text[: piece.start], piece.text[piece.start :]))
        # sentencepiece marks the beginning of each text, so an answer alone may decode to other text.
        if decoded(self.tokenizer, prompt + answer) == decoded(self.tokenizer, ids):
            ids = prompt + answer
            places = [*before, *((start + piece.start, end + piece.start) for start, end in behind)]
        return Encoded(ids, labels_of(ids, _learned([piece], places)), int(piece.given))


def _learned(pieces: Sequence[Piece], places: Sequence[Span]) -> list[bool]:
    """Return for each token whether a piece trains it; `places` are the tokens' spans, in order."""
    learned = [False] * len(places)
    for piece in pieces:
        first = bisect_right(places, piece.start, key=lambda place: place[1])
        last = bisect_left(places, len(piece.text), key=lambda place: place[0])
        learned[first:last] = [piece.learns(place) for place in places[first:last]]
    return learned


def labels_of(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """Return labels for tokens: IGNORED where they are not trained."""
    return [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]


def inside(place: Span, span: Span) -> bool:
    """Return whether a token's span overlaps a span of the text."""
    start, end = place
    return start < end and span[0] < end and start < span[1]
