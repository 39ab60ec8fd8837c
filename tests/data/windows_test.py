"""The windows of training rows that the statistics read."""

from __future__ import annotations

from folora_q.data.tokens import IGNORED
from folora_q.data.windows import last_windows


def test_a_window_ends_at_the_last_trained_token() -> None:
    ids, labels = [[1, 2, 3, 4, 5, 6]], [[IGNORED, IGNORED, 3, 4, IGNORED, IGNORED]]
    assert last_windows(ids, labels, 3) == ([[2, 3, 4]], [[IGNORED, 3, 4]])
    assert last_windows(ids, labels, 5) == ([[1, 2, 3, 4]], [[IGNORED, IGNORED, 3, 4]])


def test_short_rows_and_rows_without_a_label_stay_or_are_cut_at_their_end() -> None:
    ids, labels = [[1, 2], [1, 2, 3, 4]], [[1, IGNORED], [IGNORED] * 4]
    assert last_windows(ids, labels, 2) == ([[1, 2], [3, 4]], [[1, IGNORED], [IGNORED] * 2])
