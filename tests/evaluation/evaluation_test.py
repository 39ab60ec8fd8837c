from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from folora_q.data.formats import Completion
from folora_q.data.tokens import IGNORED, batches
from folora_q.errors import RunFailed, UserError
from folora_q.evaluation import logits
from folora_q.evaluation.divergence import divergence
from folora_q.evaluation.loss import GENERAL_TEXT, mean_loss, text_windows
from folora_q.evaluation.task import Answer, answer_all, exact_match
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.recipe.schema import AdapterSection, ModelSection

CPU = torch.device("cpu")
TEXT = [[3, 40, 50, 60, 70], [9, 8, 7], [100, 101, 102, 103], [5, 6]]


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))


@pytest.fixture(scope="module")
def tuned(base: LoadedModel):
    model = attach_adapter(base, AdapterSection(r=4), seed=0)
    for number, pair in enumerate(adapter_pairs(model)):
        torch.nn.init.normal_(pair.b, std=0.3, generator=torch.Generator().manual_seed(number))
    return model.eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """So that even these few tokens fill several chunks, the last one in part."""
    monkeypatch.setattr(logits, "CHUNK", 3)


def full_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double()


def test_the_loss_is_the_mean_over_labelled_tokens_not_over_batches(tuned) -> None:
    labels = [ids[:1] + [IGNORED] + ids[2:] for ids in TEXT]
    losses = torch.cat(
        [
            cross_entropy(full_logits(tuned, ids)[:-1], torch.tensor(wanted[1:]), reduction="none")[1:]
            for ids, wanted in zip(TEXT, labels, strict=True)
        ]
    )
    for size in (1, 2, 4):
        found = mean_loss(tuned.get_base_model(), batches(TEXT, size, CPU, labels))
        assert found == pytest.approx(float(losses.mean()), rel=1e-5)


def test_the_divergence_is_the_mean_kl_from_full_logits(tuned) -> None:
    kl, agreed = [], []
    for ids in TEXT:
        with tuned.disable_adapter():
            p = log_softmax(full_logits(tuned, ids)[:-1], -1)
        q = log_softmax(full_logits(tuned, ids)[:-1], -1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
    for size in (1, 3):
        found = divergence(tuned, batches(TEXT, size, CPU))
        assert found.kl_nats_per_token == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
        assert found.top1_agreement == pytest.approx(float(torch.cat(agreed).mean()))
        assert found.tokens == sum(len(ids) - 1 for ids in TEXT)
    assert found.kl_nats_per_token > 0.01


def test_without_a_change_nothing_is_forgotten(base: LoadedModel, tiny_folder: Path) -> None:
    fresh = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    found = divergence(attach_adapter(fresh, AdapterSection(r=4), seed=0).eval(), batches(TEXT, 2, CPU))
    assert (found.kl_nats_per_token, found.top1_agreement) == (0.0, 1.0)


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    return Gemma2ForCausalLM(config).eval()


def test_capped_logits_are_capped_in_chunks_too() -> None:
    model, ids = gemma2(), list(range(1, 12))
    expected = cross_entropy(full_logits(model, ids)[:-1], torch.tensor(ids[1:]))
    assert mean_loss(model, batches([ids], 1, CPU)) == pytest.approx(float(expected), rel=1e-5)


def test_a_head_that_does_more_than_we_know_is_refused(monkeypatch) -> None:
    model = gemma2()
    head_logits = logits.head_logits
    monkeypatch.setattr(logits, "head_logits", lambda *args: head_logits(*args) * 1.1)
    with pytest.raises(RunFailed, match="Gemma2ForCausalLM cannot be computed in chunks"):
        mean_loss(model, batches([[1, 2, 3]], 1, CPU))


def test_windows_cover_the_text_once(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10, encoding="utf-8")
    windows = text_windows(path, tokenizer, 40)
    assert [len(window) for window in windows] == [40, 40, 20]
    assert tokenizer.decode(sum(windows, [])) == path.read_text()
    assert [len(window) for window in text_windows(path, tokenizer, 45)] == [45, 45], "10 tokens are too few to measure"
    path.write_text("abc", encoding="utf-8")
    with pytest.raises(UserError, match="is too short: 3 tokens"):
        text_windows(path, tokenizer, 40)
    with pytest.raises(UserError, match="cannot read the general text"):
        text_windows(tmp_path / "gone.txt", tokenizer, 40)


def test_the_packaged_text_is_plain_and_has_its_sources_beside_it() -> None:
    text = GENERAL_TEXT.read_text("ascii")
    assert 10_000 < len(text) < 20_000
    assert "Gutenberg" in GENERAL_TEXT.with_name("general.SOURCES.md").read_text("utf-8")


def test_answers_are_the_models_own_whatever_stands_beside_them_in_a_batch(tuned, base: LoadedModel) -> None:
    examples = [Completion("a test", "ab" * length, "x") for length in (9, 2, 5)]
    together = answer_all(tuned, base.tokenizer, examples, 8, batch_size=3)
    alone = [answer_all(tuned, base.tokenizer, [example], 8, batch_size=1)[0] for example in examples]
    assert together == alone
    for example, answer in zip(examples, together, strict=True):
        ids = base.tokenizer(example.prompt)["input_ids"]
        for _ in range(8):
            ids.append(int(full_logits(tuned, ids)[-1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        assert answer.answer == base.tokenizer.decode(ids[len(example.prompt) :], skip_special_tokens=True)


def test_exact_match_forgives_white_space_around_and_nothing_else() -> None:
    answers = [Answer("q", answer, '{"a": 1}') for answer in ('{"a": 1}', ' {"a": 1}\n', '{"a":1}', "")]
    assert exact_match(answers) == 0.5
