"""Scores of answers under chat templates that write thoughts, channels and empty thoughts of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat
from folora_q.data.thoughts import Said
from folora_q.errors import RunError
from folora_q.evaluation.task import Generation, Question, Questions, greedy_tokens, make_scorer
from folora_q.recipe.evaluation import EvaluationSection
from tests.data.chats import CALL, RESULT, ROWS, TEMPLATES, TOOLS, encoder_for, thinking
from tests.data.rows import assistant, user
from tests.data.trl_templates_test import READINGS, expected

EXACT = make_scorer(EvaluationSection(metric="exact_match"), allow_code=False)
THINKING = [name for name, reading in READINGS.items() if reading.thought]


def asked(encoder: Encoder, chat: Chat) -> tuple[Questions, Question]:
    reader = Questions(encoder.renderer)
    [question] = reader.of_task([chat])
    return reader, question


def said_by_a_perfect_model(encoder: Encoder, chat: Chat, question: Question) -> list[int]:
    """What follows the question in the sequence that was trained, up to its end."""
    encoded = encoder(chat)[-1]
    assert encoded.input_ids[: len(question.ids)] == question.ids
    return encoded.input_ids[len(question.ids) :]


@pytest.mark.parametrize("setting", ["given", "learn"])
@pytest.mark.parametrize("name", READINGS)
def test_a_perfect_model_is_right_with_every_template_and_an_imperfect_one_is_not(name: str, setting: str) -> None:
    encoder = encoder_for(TEMPLATES[name], without_thought=setting)
    for row, (messages, tools) in ROWS.items():
        if expected(READINGS[name], row) is None:
            continue
        chat = Chat("here", messages, tools=tools)
        reader, question = asked(encoder, chat)
        perfect = said_by_a_perfect_model(encoder, chat, question)
        ends = encoder.ends_of_turn([chat])
        stopped = perfect[: next(i for i, token in enumerate(perfect) if token in ends) + 1]
        assert reader.read(question, stopped) == question.reference, row
        assert EXACT(reader.read(question, perfect), question.reference) == 1, row
        assert question.reference.answer.strip().endswith(messages[-1]["content"].rpartition("\n")[2])
        wrong = encoder.renderer.ids(encoder.tokenizer.decode(perfect).replace(messages[-1]["content"][-3:], "no"))
        assert EXACT(reader.read(question, wrong), question.reference) == 0, row


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_told_from_answers_and_do_not_count(name: str) -> None:
    encoder = encoder_for(TEMPLATES[name])
    reader, question = asked(encoder, Chat("here", [user("hi"), thinking(assistant("hello"), "carry")]))
    assert (question.reference.answer.strip(), question.reference.thought) == ("hello", "carry")
    other = Chat("here", [user("hi"), thinking(assistant("hello"), "other thought")])
    said = reader.read(question, said_by_a_perfect_model(encoder, other, question))
    assert (said.answer.strip(), said.thought) == ("hello", "other thought")
    assert EXACT(said, question.reference) == 1


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_that_never_ends_is_no_answer(name: str) -> None:
    encoder = encoder_for(TEMPLATES[name])
    chat = Chat("here", [user("hi"), thinking(assistant("hello"), "hello")])
    reader, question = asked(encoder, chat)
    whole = encoder.tokenizer.decode(said_by_a_perfect_model(encoder, chat, question))
    cut = encoder.renderer.ids(whole[: whole.index("hello") + len("hello")])
    assert reader.read(question, cut) == Said("", "hello")


@pytest.mark.parametrize("name", [name for name in READINGS if READINGS[name].call])
def test_a_call_is_right_if_it_is_the_call_that_was_to_be_made(name: str) -> None:
    encoder = encoder_for(TEMPLATES[name])
    turns = [user("hi"), CALL]
    if READINGS[name].thought:
        turns[1] = thinking(CALL, "carry")
    chat = Chat("here", turns, tools=TOOLS)
    reader, question = asked(encoder, chat)
    assert "add" in question.reference.answer
    perfect = said_by_a_perfect_model(encoder, chat, question)
    assert EXACT(reader.read(question, perfect), question.reference) == 1
    other = encoder.renderer.ids(encoder.tokenizer.decode(perfect).replace("add", "sub"))
    assert EXACT(reader.read(question, other), question.reference) == 0


def test_the_turn_that_is_asked_for_is_the_last_that_is_learned() -> None:
    encoder = encoder_for(TEMPLATES["qwen2_5"])
    turns = [user("hi"), CALL, RESULT, assistant("three"), user("so?"), assistant("bad")]
    _, question = asked(encoder, Chat("here", turns, tools=TOOLS, unlearned=(5,)))
    assert question.prompt == turns[:3] and question.reference.answer.strip() == "three"
    assert "<tools>" in question.asked


@pytest.mark.parametrize("setting", ["given", "learn"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "nemotron_3_nano"])
def test_a_model_that_has_learned_its_rows_is_right(name: str, setting: str) -> None:
    """The rows of models-and-data.md B2: forty questions whose answer is yes."""
    encoder = encoder_for(TEMPLATES[name], without_thought=setting)
    chats = [Chat("here", [user(f"is {number} a number?"), assistant("yes")]) for number in range(40)]
    sequences = [encoded for chat in chats[:4] for encoded in encoder(chat)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(encoder.tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            eos_token_id=encoder.end_of_turn,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        for encoded in sequences:
            ids, labels = torch.tensor([encoded.input_ids]), torch.tensor(encoded.labels)
            loss = cross_entropy(model(ids).logits[0, :-1], labels[1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.05
    reader = Questions(encoder.renderer)
    questions = reader.of_task(chats[:4])
    answers = greedy_tokens(model, encoder.tokenizer, [question.ids for question in questions], Generation(40, 4))
    said = [reader.read(question, ids) for question, ids in zip(questions, answers, strict=True)]
    assert [answer.answer.strip() for answer in said] == ["yes"] * 4
    assert all(EXACT(answer, question.reference) for answer, question in zip(said, questions, strict=True))


def test_a_users_function_may_ask_for_the_thoughts(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text(
        "def plain(answer, reference): return answer == reference\n"
        "def long(answer, reference, thought): return len(thought) / 10\n"
        "def both(answer, reference, *, thought, reference_thought): return thought == reference_thought\n"
    )

    def score(name: str, said: Said, reference: Said) -> float:
        section = EvaluationSection(metric="function", metric_function=f"{path}:{name}")
        return make_scorer(section, allow_code=True)(said, reference)

    said, reference = Said("a", "carry"), Said("a", "other")
    assert score("plain", said, reference) == 1
    assert score("long", said, reference) == 0.5
    assert score("both", said, reference) == 0
    with pytest.raises(RunError, match="gave 2.0"):
        score("long", Said("a", "x" * 20), reference)
