from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.calibration.sample import ProxySample, SamplingContext, _passes, chat_openings, sample_proxy, start_token
from folora_q.calibration.sample_cache import cache_path, read_samples, write_samples
from folora_q.data.windows import crops
from folora_q.errors import RunError, UserError
from folora_q.recipe.schema import ProxySection
from tests.conftest import save_tiny_model
from tests.data.chats import TEMPLATES, tokenizer_for

SMALL = {"num_samples": 6, "num_heldout_samples": 3, "max_new_tokens": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)


def test_samples_begin_with_bos_and_repeat_with_the_seed(tiny) -> None:
    model, tokenizer = tiny
    state = torch.get_rng_state()
    section = ProxySection(**SMALL)
    first = sample_proxy(model, tokenizer, section)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state must not move"
    torch.rand(5)
    assert sample_proxy(model, tokenizer, section) == first
    assert sample_proxy(model, tokenizer, ProxySection(**SMALL, seed=1)) != first
    assert len(first) == 9
    assert all(s.ids[0] == tokenizer.bos_token_id and 16 <= len(s.ids) <= 25 for s in first)


def test_progress_counts_every_sample_once(tiny) -> None:
    model, tokenizer = tiny
    counted: list[int] = []
    sample_proxy(model, tokenizer, ProxySection(**SMALL), SamplingContext(counted.append))
    assert sum(counted) == 9


def test_mixed_text_holds_chats_and_both_kinds_are_held_out(tiny) -> None:
    model, tokenizer = tiny
    samples = sample_proxy(model, tokenizer, ProxySection(**SMALL, source="mixed"))
    assert [s.source for s in samples] == ["bos", "chat"] * 4 + ["bos"]
    for sample in samples:
        text = tokenizer.decode(sample.ids)
        if sample.source == "chat":
            assert text.startswith("<|im_start|>user\n")
            assert "<|im_end|>\n<|im_start|>assistant\n" in text


def test_a_model_without_bos_samples_from_its_separator(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", bos=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert start_token(tokenizer) == separator
    assert {s.ids[0] for s in sample_proxy(model, tokenizer, ProxySection(**SMALL))} == {separator}


def test_chats_need_a_template_that_shows_what_the_user_says(tiny) -> None:
    _, tokenizer = tiny
    assert chat_openings(tokenizer) == "<|im_start|>user\n"
    template = tokenizer.chat_template
    try:
        for broken, message in (("nothing", "does not render the user's text"), (None, "has no chat template")):
            tokenizer.chat_template = broken
            with pytest.raises(UserError, match=message):
                chat_openings(tokenizer)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("ids", "passes"),
    [
        (list(range(32)), True),
        (list(range(31)), False),  # short
        ([*range(32), *[7] * 20], False),  # a run
        ([1, 2, 3, 4] * 40, False),  # few distinct tokens
        (list(range(40)) * 8, False),  # few distinct 4-grams
    ],
)
def test_the_papers_filters(ids: list[int], passes: bool) -> None:
    assert _passes(ids, ProxySection(filters=True), set()) is passes
    assert _passes(ids, ProxySection(filters=False), set()) is True


def test_filters_drop_duplicates() -> None:
    section, seen = ProxySection(filters=True), set()
    assert [_passes(list(range(40)), section, seen) for _ in range(2)] == [True, False]


def test_a_model_that_writes_too_little_ends_in_a_sentence_not_in_a_loop(tiny) -> None:
    model, tokenizer = tiny
    section = ProxySection(**{**SMALL, "max_new_tokens": 16}, filters=True)  # never 32 tokens long
    with pytest.raises(RunError, match="only 0 of 9 sampled texts"):
        sample_proxy(model, tokenizer, section)


def test_the_papers_mixture_is_drawn_in_its_shares(tiny, monkeypatch) -> None:
    model, tokenizer = tiny
    calls: list[tuple[int, float, int, float]] = []
    generate = model.generate

    def spy(input_ids, **kwargs):
        calls.append((len(input_ids), kwargs["top_p"], kwargs["top_k"], kwargs["temperature"]))
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    section = ProxySection(num_samples=18, num_heldout_samples=2, max_new_tokens=40, batch_size=20, decoding="paper")
    sample_proxy(model, tokenizer, section)
    assert calls[:3] == [(14, 1.0, 0, 1.0), (4, 0.95, 0, 1.0), (2, 0.98, 50, 1.2)]


def test_the_cache_is_readable_keyed_by_everything_and_forgiving(tiny, tmp_path: Path) -> None:
    _, tokenizer = tiny
    samples = [ProxySample([1, 70, 80], "bos"), ProxySample([1, 90], "chat")]
    section = ProxySection(**SMALL)
    path = cache_path("f", "float32", None, section)
    assert read_samples(path, 100) is None
    write_samples(path, samples, tokenizer)
    assert read_samples(path, 100) == samples
    assert read_samples(path, 90) is None, "of a larger vocabulary: no text of this model's"
    assert json.loads(path.read_text("utf-8").splitlines()[0])["text"] == tokenizer.decode([1, 70, 80])
    others = {
        cache_path("g", "float32", None, section),
        cache_path("f", "bfloat16", None, section),
        cache_path("f", "float32", "{{ 1 }}", section),
        cache_path("f", "float32", None, ProxySection(**SMALL, seed=1)),
        cache_path("f", "float32", None, ProxySection(**SMALL, source="chat")),
    }
    assert len(others | {path}) == 6
    assert path == cache_path("f", "float32", None, ProxySection(**SMALL, statistics_memory=1))
    path.write_text(path.read_text("utf-8")[:-20], encoding="utf-8")
    assert read_samples(path, 100) is None, "a cut file is sampled again"


def test_crops_begin_in_the_first_half() -> None:
    samples = [list(range(20)), list(range(100, 140))]
    for ids, crop in zip(samples, crops(samples, seed=3), strict=True):
        assert crop == ids[-len(crop) :]
        assert len(ids) / 2 <= len(crop) < len(ids)
    assert crops(samples, 3) == crops(samples, 3)


def test_chats_open_also_where_a_template_takes_contents_in_parts_alone() -> None:
    """As those of vision models do, which render a text that is no list as nothing."""
    tokenizer = tokenizer_for(TEMPLATES["smolvlm"])
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert chat_openings(tokenizer) + "hello" in tokenizer.apply_chat_template(parts, tokenize=False)
