"""What libraries print beside ours."""

from __future__ import annotations

import pytest

from folora_q.cli.console import quiet_progress_bars


def test_the_gguf_reader_draws_no_bar(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    monkeypatch.setattr(gguf_reader, "tqdm", gguf_reader.tqdm)  # put back afterwards
    quiet_progress_bars()
    assert list(gguf_reader.tqdm(range(3), desc="Converting")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
