"""What is shown while a run goes on, and what libraries print beside ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

from folora_q.cli import console, stage_line
from folora_q.cli.console import ConsoleProgress, quiet_progress_bars


def test_the_gguf_reader_draws_no_bar(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    monkeypatch.setattr(gguf_reader, "tqdm", gguf_reader.tqdm)  # put back afterwards
    quiet_progress_bars()
    assert list(gguf_reader.tqdm(range(3), desc="Converting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_the_time_left_is_told_from_the_speed_after_the_first_count(monkeypatch, capfd) -> None:
    """The first text waits for what comes before it: here a minute and a half, of texts that take two seconds."""
    now = [0.0]
    for module in (console, stage_line):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with ConsoleProgress(Console(width=80)).stage("sampling", 200, "texts") as advance:
        for count, seconds in ((1, 90), (1, 2), (9, 18), (89, 178)):
            now[0] += seconds
            advance(count)
    assert capfd.readouterr().out.splitlines() == [
        "[start] sampling (200 texts)",
        "  sampling: 1/200 texts",
        "  sampling: 100/200 texts, about 3:20 left",
        "[done] sampling, 4:48",
    ]
