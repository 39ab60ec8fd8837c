"""Limits for what must be kept: what they say, and what breaks them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from folora_q.errors import UserError
from folora_q.evaluation.intervals import score_change
from folora_q.recipe.keep import KeepSection
from folora_q.runs.keep_limits import keep_of, load_limits
from folora_q.runs.results import Interval, KeptResult


def result(name: str, base: int, tuned: int, kl: float = 0.01) -> KeptResult:
    """Of 20 prompts so many are answered well; those of the tuned model are among the base's, or the reverse."""
    scores = (np.arange(20) < base, np.arange(20) < tuned)
    return KeptResult(name, "a metric", 20, score_change(*scores), Interval(kl), Interval(0.9))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keep.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("limit", "base", "tuned", "reason"),
    [
        ("0.8", 20, 16, None),
        ("0.8", 20, 15, "scores 75.0%, below 80.0%"),
        ("{score: 0.5}", 4, 10, None),
        ("{fall: 0.05}", 20, 19, None),
        ("{fall: 0.05}", 20, 18, "fell from 100.0% to 90.0%, by more than 5.0%"),
        ("{fall: 0}", 10, 12, None),
        ("{kl: 0.01}", 20, 0, None),
        ("{kl: 0.009}", 20, 20, "has a KL of 0.01, above 0.009"),
        ("", 20, 19, None),
        ("", 20, 10, "fell by more than chance explains: from 100.0% to 50.0%"),
    ],
)
def test_limits(tmp_path: Path, limit: str, base: int, tuned: int, reason: str | None) -> None:
    limits = load_limits(written(tmp_path, f"tools: {limit}\n"))
    assert limits.section == KeepSection(capabilities=["tools"])
    assert limits.failures([result("tools", base, tuned)]) == ([] if reason is None else [f"tools {reason}"])


def test_a_list_is_short_for_capabilities_without_numbers(tmp_path: Path) -> None:
    limits = load_limits(written(tmp_path, "[tools, code]"))
    assert limits.failures([result("tools", 20, 20), result("code", 20, 5)]) == [
        "code fell by more than chance explains: from 100.0% to 25.0%"
    ]


def test_what_was_not_measured_is_not_kept(tmp_path: Path) -> None:
    limits = load_limits(written(tmp_path, "[tools, code]"))
    assert limits.failures([result("code", 20, 20)]) == ["tools was not measured"]


def test_a_kl_that_is_not_a_number_is_above_any_limit(tmp_path: Path) -> None:
    limits = load_limits(written(tmp_path, "tools: {kl: 1}"))
    assert limits.failures([result("tools", 20, 20, float("nan"))])


def test_files_are_relative_to_the_limits_and_have_a_kl(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    limits = load_limits(written(tmp_path, "mine.jsonl: {kl: 0.05}\ncode: 0.1"))
    assert limits.section == KeepSection(capabilities=["code"], files=[str(tmp_path / "mine.jsonl")])
    file = KeptResult("mine", None, 20, None, Interval(0.06), Interval(0.9))
    assert limits.failures([file, result("code", 20, 20)]) == ["mine.jsonl has a KL of 0.06, above 0.05"]
    with pytest.raises(UserError, match="mine.jsonl is a file, whose only limit is `kl`"):
        load_limits(written(tmp_path, "mine.jsonl: 0.5"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tolls: 0.5", "'tolls' is neither a capability nor a file; did you mean tools"),
        ("tools: 1.5", "tools.score: input should be less than or equal to 1"),
        ("tools: {rise: 1}", "tools.rise"),
        ("tools: yes it is", "tools"),
        ("3", "must map"),
        ("", "must map"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_file_of_limits_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_limits(written(tmp_path, text))


def test_names_on_the_command_line_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    found = keep_of(["arithmetic", "mine.jsonl"], tmp_path, "--keep")
    assert found == KeepSection(capabilities=["arithmetic"], files=[str(tmp_path / "mine.jsonl")])
