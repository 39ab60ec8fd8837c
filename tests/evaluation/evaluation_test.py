from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.examples import Completion
from folora_q.data.rendering import Renderer
from folora_q.data.thoughts import Said
from folora_q.data.tokens import IGNORED, batches
from folora_q.errors import RunError, UserError
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.drift import measured_drift
from folora_q.evaluation.evaluate import general_texts
from folora_q.evaluation.loss import GENERAL_TEXTS, mean_loss, text_windows
from folora_q.evaluation.model_pair import ModelPair
from folora_q.evaluation.task import (
    GENERAL_PROMPTS,
    Generation,
    Questions,
    answer_both,
    greedy_tokens,
    make_scorer,
    mean_score,
)
from folora_q.models import logits
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.evaluation import EvaluationSection
from folora_q.recipe.schema import ModelSection
from tests.conftest import save_tiny_model

CPU = torch.device("cpu")
TEXT = [[3, 40, 50, 60, 70], [9, 8, 7], [100, 101, 102, 103], [5, 6]]


def greedy_answers(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], *settings: Any, **more: Any
) -> list[str]:
    """The text of `greedy_tokens`, without special tokens."""
    answers = greedy_tokens(model, tokenizer, prompts, Generation(*settings, **more))
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


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
    monkeypatch.setattr(logits, "LOGIT_ROWS", 3)


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


def on(sequences: list[list[int]], size: int, labels: list[list[int]] | None = None) -> HeldOutText:
    return HeldOutText("a test", "own", list(batches(sequences, size, CPU, labels)))


def test_a_comparison_is_what_full_logits_say(tuned) -> None:
    labels = [ids[:1] + [IGNORED] + ids[2:] for ids in TEXT]
    kl, agreed, losses = [], [], ([], [])
    for ids, wanted in zip(TEXT, labels, strict=True):
        counted = torch.tensor(wanted[1:]) != IGNORED
        with tuned.disable_adapter():
            p = log_softmax(full_logits(tuned, ids)[:-1], -1)[counted]
        q = log_softmax(full_logits(tuned, ids)[:-1], -1)[counted]
        kl.append((p.exp() * (p - q)).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
        for log, found in zip((p, q), losses, strict=True):
            found.append(cross_entropy(log, torch.tensor(wanted[1:])[counted], reduction="none"))
    mean = lambda parts: float(torch.cat(parts).mean())  # noqa: E731
    for size in (1, 3):
        found = compare(ModelPair(tuned), on(TEXT, size, labels))
        assert found.kl.value == pytest.approx(mean(kl), rel=1e-4)
        assert found.top1_agreement.value == pytest.approx(mean(agreed))
        assert found.loss.base.value == pytest.approx(mean(losses[0]), rel=1e-5)
        assert found.loss.tuned.value == pytest.approx(mean(losses[1]), rel=1e-5)
        assert found.loss.change.value == pytest.approx(mean(losses[1]) - mean(losses[0]), abs=1e-5)
        assert (found.tokens, found.texts) == (sum(len(ids) - 2 for ids in TEXT), 3), "one has no token that counts"
    assert found.kl.bounds is None and found.kl.value > 0.01


def test_two_models_are_compared_as_an_adapter_is(tuned, base: LoadedModel, tiny_folder: Path) -> None:
    other = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    as_adapter, as_two = (
        compare(ModelPair(tuned), on(TEXT, 2)),
        compare(ModelPair(base.model, other.model), on(TEXT, 2)),
    )
    assert as_two.kl.value == pytest.approx(as_adapter.kl.value, rel=1e-5), "the base model carries the adapter"
    assert as_two.loss.base.value == pytest.approx(as_adapter.loss.base.value, rel=1e-5)


def test_a_trained_head_does_not_answer_for_the_base(tiny_folder: Path) -> None:
    loaded = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    loaded.model.config.tie_word_embeddings = False
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, config).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    found = compare(ModelPair(model), on(TEXT, 2))
    with model.disable_adapter():
        expected = mean_loss(model.get_base_model(), batches(TEXT, 2, CPU))
    assert found.loss.base.value == pytest.approx(expected, rel=1e-5)
    assert found.kl.value > 0.01


def test_models_of_different_vocabularies_are_refused(base: LoadedModel) -> None:
    with pytest.raises(UserError, match="their predictions cannot be compared"):
        ModelPair(gemma2(), base.model)
    with pytest.raises(ValueError, match="two models"):
        ModelPair(base.model)


def test_without_a_change_nothing_is_forgotten(tiny_folder: Path) -> None:
    fresh = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    found = compare(ModelPair(attach_adapter(fresh, AdapterSection(r=4), seed=0)), on(TEXT, 2))
    assert (found.kl.value, found.top1_agreement.value, found.loss.change.value) == (0.0, 1.0, 0.0)


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
    with pytest.raises(RunError, match="Gemma2ForCausalLM cannot be computed in chunks"):
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


def test_the_packaged_texts_are_as_long_as_each_other_and_name_their_sources() -> None:
    assert list(GENERAL_TEXTS) == ["prose", "manual", "code"]
    sizes = [len(path.read_text("utf-8")) for path in GENERAL_TEXTS.values()]
    assert min(sizes) == max(sizes) > 10_000
    assert GENERAL_TEXTS["code"].read_text("utf-8").count("\ndef ") > 5
    sources = GENERAL_TEXTS["prose"].with_name("SOURCES.md").read_text("utf-8")
    assert all(path.name in sources for path in GENERAL_TEXTS.values())


def test_all_packaged_texts_are_measured_unless_a_recipe_names_its_own() -> None:
    assert general_texts(EvaluationSection()) == GENERAL_TEXTS
    assert list(general_texts(EvaluationSection(general_text=["a/one.txt", "b/two.txt"]))) == ["one", "two"]


def test_a_tokenizer_needs_no_padding_token_to_answer(tuned, base: LoadedModel) -> None:
    prompts = [base.tokenizer("ab" * length)["input_ids"] for length in (9, 2)]
    bare = copy.deepcopy(base.tokenizer)
    bare.pad_token = None
    expected, found = (greedy_answers(tuned.get_base_model(), t, prompts, 8, 2) for t in (base.tokenizer, bare))
    assert found == expected


def test_answers_are_the_models_own_whatever_stands_beside_them_in_a_batch(tuned, base: LoadedModel) -> None:
    prompts = [base.tokenizer("ab" * length)["input_ids"] for length in (9, 2, 5)]
    model = tuned.get_base_model()
    together = greedy_answers(model, base.tokenizer, prompts, 8, batch_size=3)
    assert together == [greedy_answers(model, base.tokenizer, [prompt], 8, batch_size=1)[0] for prompt in prompts]
    for ids, answer in zip(prompts, together, strict=True):
        ids = list(ids)
        length = len(ids)
        for _ in range(8):
            ids.append(int(full_logits(tuned, ids)[-1].argmax()))
            if ids[-1] == base.tokenizer.eos_token_id:
                break
        assert answer == base.tokenizer.decode(ids[length:], skip_special_tokens=True)


def test_both_models_answer_and_only_the_task_is_scored(tuned, base: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("what is it?\n\nand this?\n", encoding="utf-8")
    reader = Questions(Renderer(base.tokenizer))
    questions = reader.of_task([Completion("a", "abab", "x"), Completion("a", "cd", "y")]) + reader.general(path)
    answers = answer_both(ModelPair(tuned), reader, questions, Generation(4, 4), lambda answer, reference: 0.25)
    assert [(a.kind, a.asked, a.reference) for a in answers] == [
        ("task", "abab", "x"),
        ("task", "cd", "y"),
        ("general", "what is it?", None),
        ("general", "and this?", None),
    ]
    assert [a.tuned_score for a in answers] == [0.25, 0.25, None, None]
    prompt = base.tokenizer.apply_chat_template(answers[2].prompt, add_generation_prompt=True)["input_ids"]
    with tuned.disable_adapter():
        [expected] = greedy_answers(tuned.get_base_model(), base.tokenizer, [prompt], 4, 1)
    assert answers[2].base == expected
    found = mean_score(answers, "regex")
    assert (found.answers, found.score.base.value, found.score.change.value) == (2, 0.25, 0.0)
    assert mean_score(answers[2:], "regex") is None


def test_there_are_packaged_prompts_for_models_with_and_without_chats(base: LoadedModel, tmp_path: Path) -> None:
    with_chats = Questions(Renderer(base.tokenizer)).general(GENERAL_PROMPTS)
    plain = Questions(Renderer(AutoTokenizer.from_pretrained(save_tiny_model(tmp_path, chat=False)))).general(
        GENERAL_PROMPTS
    )
    assert len(with_chats) == len(plain) == 6
    assert with_chats[0].prompt == [{"role": "user", "content": plain[0].prompt}]


def test_prompts_that_a_template_refuses_are_not_asked(base: LoadedModel) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{% if '17' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    assert len(Questions(Renderer(tokenizer)).general(GENERAL_PROMPTS)) == 5


@pytest.mark.parametrize(
    ("settings", "answer", "reference", "score"),
    [
        ({"metric": "exact_match"}, ' {"a": 1}\n', '{"a": 1}', 1),
        ({"metric": "exact_match"}, '{"a":1}', '{"a": 1}', 0),
        ({"metric": "exact_match"}, "", '{"a": 1}', 0),
        ({"metric": "regex"}, "3 and 4 are 7", "the sum is 7.", 1),
        ({"metric": "regex"}, "3 and 4 are 8", "the sum is 7.", 0),
        ({"metric": "regex"}, "nothing", "nothing", 0),
        ({"metric": "regex", "metric_pattern": r"#### (\S+)"}, "7 #### 8", "so #### 8", 1),
        ({"metric": "regex", "metric_pattern": r"#### (\S+)"}, "#### 8 #### 9", "so #### 8", 0),
    ],
)
def test_answers_are_scored_as_the_recipe_says(settings: dict, answer: str, reference: str, score: float) -> None:
    assert make_scorer(EvaluationSection(**settings), allow_code=False)(Said(answer), Said(reference)) == score


def test_a_users_function_scores_only_where_code_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text(
        "def half(answer, reference): return 0.5\ndef much(answer, reference): return 2\n"
        "def bad(answer, reference): return answer.nothing\n"
    )
    function = lambda name: EvaluationSection(metric="function", metric_function=f"{path}:{name}")  # noqa: E731
    with pytest.raises(UserError, match="runs the Python in .*metric.py"):
        make_scorer(function("half"), allow_code=False)
    assert make_scorer(function("half"), allow_code=True)(Said("a"), Said("b")) == 0.5
    with pytest.raises(RunError, match="gave 2.0, which is not a score between 0 and 1"):
        make_scorer(function("much"), allow_code=True)(Said("a"), Said("b"))
    with pytest.raises(RunError, match="bad in .*metric.py failed on the answer 'a'"):
        make_scorer(function("bad"), allow_code=True)(Said("a"), Said("b"))
    with pytest.raises(UserError, match="cannot load gone from"):
        make_scorer(function("gone"), allow_code=True)
    path.write_text("def half(:")
    with pytest.raises(UserError, match="SyntaxError"):
        make_scorer(function("half"), allow_code=True)


def test_where_memory_runs_out_the_same_is_measured_in_halves(tuned, base: LoadedModel) -> None:
    model_pair, text = ModelPair(tuned), on(TEXT, 4)
    prompts = [base.tokenizer("ab" * length)["input_ids"] for length in (9, 2, 5)]
    expected = compare(model_pair, text), measured_drift(model_pair, text.batches)
    answers = greedy_answers(tuned.get_base_model(), base.tokenizer, prompts, 4, 3)
    loss = mean_loss(tuned.get_base_model(), text.batches)
    taken: list[int] = []
    backbone = tuned.get_base_model().model.layers[1]

    def hook(module, args, kwargs) -> None:
        rows = len(args[0] if args else kwargs["hidden_states"])
        taken.append(rows)
        if rows > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = backbone.register_forward_pre_hook(hook, with_kwargs=True)
    told: list[str] = []
    try:
        splitter = BatchSplitter("measuring", told.append)
        found = compare(model_pair, text, splitter=splitter)
        assert found.kl.value == pytest.approx(expected[0].kl.value, rel=1e-5)
        assert found.loss.tuned.value == pytest.approx(expected[0].loss.tuned.value, rel=1e-6)
        assert told == [
            "memory ran out while measuring 4 sequences at a time; continuing with 2",
            "memory ran out while measuring 2 sequences at a time; continuing with 1",
        ]
        assert measured_drift(model_pair, text.batches, splitter=splitter) == pytest.approx(expected[1], rel=1e-5)
        assert mean_loss(tuned.get_base_model(), text.batches, splitter=splitter) == pytest.approx(loss, rel=1e-6)
        again = greedy_answers(tuned.get_base_model(), base.tokenizer, prompts, 4, 3, splitter=splitter)
        assert again == answers and len(told) == 2
        with pytest.raises(RunError, match="memory ran out while comparing, with 4 sequences"):
            compare(model_pair, text)
    finally:
        handle.remove()


def test_an_answer_ends_with_a_table_of_positions(base: LoadedModel) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 261, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=2)).eval()
    prompt = list(range(100, 120))
    (answer,) = greedy_answers(model, base.tokenizer, [prompt], 16, 1)
    written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5)[0, 20:]
    assert answer == base.tokenizer.decode(written, skip_special_tokens=True)
    with pytest.raises(IndexError):
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
