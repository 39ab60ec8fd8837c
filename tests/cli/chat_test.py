"""Talking to a run, an adapter and a model, on the tiny model: greedy answers are those of `generate`."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.chat import load
from folora_q.chat.load import load_chat
from folora_q.chat.reply import Chatter, Conversation, Pieces, Sampling
from folora_q.cli import app
from folora_q.cli import chat as chat_cli
from folora_q.data.encode import Encoder
from folora_q.data.examples import Chat
from folora_q.errors import RunError, UserError
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe.schema import ModelSection
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import answer_lines
from folora_q.runs.results import AnswerResult
from tests.conftest import save_tiny_model
from tests.data.chats import TEMPLATES, tokenizer_for
from tests.data.rows import assistant, user, write_jsonl
from tests.forked import in_a_terminal
from tests.targets.folders import write_adapter, write_merged

SYSTEM = {"role": "system", "content": "be brief"}
GREEDY = Sampling(temperature=0, max_new_tokens=12)
SHORT = ["--temperature", 0, "--max-new-tokens", 12]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, large enough to change what the model says."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"messages": [SYSTEM, user(f"say {i}"), assistant(f"it is {i}")]} for i in range(12)]
    recipe = {
        "model": {"model_name_or_path": str(tiny_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"train_dataset": str(write_jsonl(folder / "train.jsonl", rows)), "eval_size": 2},
        "proxy": {"num_samples": 2, "num_heldout_samples": 2, "max_new_tokens": 16, "public_share": 0},
        "gate": {"enabled": False},
        "training": {"output_dir": str(folder / "run"), "learning_rate": 0.1, "max_steps": 2, "warmup_steps": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_Q_CACHE", str(folder / "cache"))
        assert run("train", folder / "recipe.yaml", "evaluation.metric=none") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(run_folder: Path) -> Chatter:
    return load_chat(str(run_folder))


@pytest.fixture(scope="module")
def untrained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B is zero, without a tokenizer beside it."""
    return write_adapter(tiny_folder, tmp_path_factory.mktemp("untrained") / "adapter")


def said(chatter: Chatter, messages: list, base: bool = False, settings: Sampling = GREEDY) -> str:
    return "".join(chatter.reply(messages, base, settings))


def generated(model, tokenizer, messages: list, count: int = GREEDY.max_new_tokens) -> str:
    """What transformers' own `generate` says, greedily."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    with torch.no_grad():
        output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=count)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def writing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "folora-q-chat"]


# What a name stands for


def test_a_run_answers_as_its_adapter_on_its_4_bit_base_does(tuned: Chatter, run_folder: Path, tiny_folder) -> None:
    section = ModelSection(model_name_or_path=str(tiny_folder))
    base = load_model(section, choose_hardware("float32"))
    questions = [[user("hello")], [SYSTEM, user("say 4")]]
    bare = [generated(base.model, base.tokenizer, messages) for messages in questions]
    model = PeftModel.from_pretrained(base.model, run_folder / "adapter").eval()
    adapted = [generated(model, base.tokenizer, messages) for messages in questions]
    assert [said(tuned, messages) for messages in questions] == adapted
    assert [said(tuned, messages, base=True) for messages in questions] == bare
    assert [said(tuned, messages) for messages in questions] == adapted, "the adapter is back"
    assert adapted != bare
    assert tuned.system == "be brief"
    assert "4 bits, computing in float32 on CPU" in tuned.origin


def test_an_adapter_with_b_zero_says_what_its_base_says(untrained: Path) -> None:
    chatter = load_chat(str(untrained), "float32")
    assert chatter.can_compare and chatter.has_template
    first = said(chatter, [user("hello")])
    assert first and first == said(chatter, [user("hello")], base=True)


def test_an_adapters_own_template_and_stops_are_used(untrained: Path, run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(untrained, tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    chatter = load_chat(str(folder), "float32")
    assert chatter.stops == [0, chatter.tokenizer.eos_token_id]
    assert chatter.tokenizer.decode(chatter._prompt([user("hi")])) == "Q: hi\nA:"
    for token in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run_folder / "adapter" / token, folder)
    assert load_chat(str(folder), "float32").tokenizer.decode(chatter._prompt([user("hi")])) == "Q: hi\nA:"


@pytest.mark.parametrize("bits", [4, 16])
def test_a_model_answers_in_4_or_16_bits(bits: int, tiny_folder: Path) -> None:
    chatter = load_chat(str(tiny_folder), "float32", bits)
    kinds = {type(module).__name__ for module in chatter.model.modules()}
    assert ("DecodedLinear4bit" in kinds) == (bits == 4)
    assert said(chatter, [user("hello")]) == generated(chatter.model, chatter.tokenizer, [user("hello")])
    assert chatter.system is None
    with pytest.raises(UserError, match="is not an adapter, so there is nothing to compare it with"):
        chatter.reply([user("hi")], True, GREEDY)


def test_a_merged_model_is_compared_with_the_base_that_it_names(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "base", seed=1)
    merged = write_merged(tiny_folder, tmp_path / "merged", other)
    chatter = load_chat(str(merged), "float32", compare=True)
    alone = load_chat(str(other), "float32")
    for question in ("hello", "hello"):
        assert said(chatter, [user(question)], base=True) == said(alone, [user(question)])
        assert said(chatter, [user(question)]) == generated(chatter.model, chatter.tokenizer, [user(question)])
    shutil.rmtree(other)
    with pytest.raises(UserError, match=r"merge.json names a base: cannot load the model"):
        load_chat(str(merged), "float32", compare=True)


def test_without_a_chat_template_text_is_continued_and_each_question_stands_alone(tmp_path: Path, capfd) -> None:
    folder = save_tiny_model(tmp_path / "plain", chat=False)
    chatter = load_chat(str(folder))
    ids = chatter.tokenizer("the thing", return_tensors="pt")["input_ids"]
    output = chatter.model.generate(input_ids=ids, do_sample=False, max_new_tokens=12)
    expected = chatter.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert said(chatter, [user("before"), assistant("that"), user("the thing")]) == expected
    assert run("chat", folder, "--prompt", "x", "--prompt", "the thing", *SHORT) == 0
    text, talk = capfd.readouterr()
    assert text.endswith(chat_cli.visible(expected) + "\n" * (not expected.endswith("\n")))
    assert talk.count("no chat template: it continues each question as plain text") == 1
    assert run("chat", folder, "--system", "be brief", "--prompt", "x") == 2
    assert "has no chat template, so it takes no system prompt" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{run}/adaptr", "there is no run, adapter or model at '{run}/adaptr'; did you mean {run}/adapter?"),
        ("{run}/..", "is not a run, adapter or model: it holds no run.json, adapter_config.json or config.json"),
        ("{run}/run.json", "{run}/run.json is a file, but not a .gguf file"),
        ("{tmp}/gone.gguf", "there is no run, adapter or model at '{tmp}/gone.gguf'"),
        ("no/such-model", "no/such-model is neither a run or adapter here nor a model that can be loaded: "),
        ("", "there is no run, adapter or model at ''"),
        ("x" * 5000, "there is no run, adapter or model at 'xxx"),
    ],
)
def test_a_wrong_name_is_one_sentence(name: str, message: str, run_folder: Path, tmp_path: Path, capfd) -> None:
    places = {"run": run_folder, "tmp": tmp_path}
    if len(name) > 1000:
        name = "/" + name
        message = "there is no run, adapter or model at '/xxx"
    assert run("chat", name.format(**places), "--prompt", "x") == 2
    text, talk = capfd.readouterr()
    assert f"error: {message.format(**places)}" in talk or message.format(**places) in talk
    assert not text and "Traceback" not in talk and "hint: " in talk


def test_all_that_a_run_left_knows_its_system_prompt(
    run_folder: Path, untrained: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = RunFolder(shutil.copytree(run_folder, tmp_path / "run"))
    shutil.copytree(untrained, folder.path / "checkpoint-1")
    write_merged(tiny_folder, folder.merged, tmp_path / "base")
    for path in (folder.path, folder.adapter, folder.merged, folder.path / "checkpoint-1"):
        assert load_chat(str(path)).system == "be brief", path

    def answers(*prompts: list | str) -> None:
        found = [AnswerResult("general", [{"role": "system", "content": "other"}, user("x")], None, "b", "t")]
        found += [AnswerResult("task", prompt, "r", "b", "t") for prompt in prompts]
        folder.write_lines(folder.answers, answer_lines(found))

    french = {"role": "system", "content": "in French"}
    for prompts, expected in (
        ([[french, user("x")]] * 2, "in French"),  # the training rows say otherwise, if they are still the same
        ([[french, user("x")], [SYSTEM, user("x")]], "be brief"),
        ([[user("x")], "a text", []], "be brief"),
        ([], "be brief"),
    ):
        answers(*prompts)
        assert load._system_prompt(folder) == expected
    folder.answers.write_text("{")
    assert load._system_prompt(folder) == "be brief"
    recipe = yaml.safe_load(folder.recipe.read_text())
    for data in ({"train_dataset": str(tmp_path / "gone.jsonl")}, {"train_dataset": "some/dataset"}, None):
        folder.recipe.write_text(yaml.safe_dump(recipe | {"data": data}))
        assert load._system_prompt(folder) is None
    folder.recipe.unlink()
    assert load._system_prompt(folder) is None


# Streaming


def test_an_answer_comes_in_pieces_that_are_the_whole(tuned: Chatter) -> None:
    settings = Sampling(temperature=0, max_new_tokens=60)
    pieces = list(tuned.reply([user("hello")], True, settings))
    with tuned.model.disable_adapter():
        expected = generated(tuned.model, tuned.tokenizer, [user("hello")], 60)
    assert "".join(pieces) == expected
    assert len(pieces) > 3 and all(pieces)
    assert not writing()


def test_characters_come_whole_and_are_the_decoders(tuned: Chatter) -> None:
    text = "naïve — 漢字 🙂\n  indented\tthe end"
    streamer = Pieces(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in [*tuned.tokenizer(text)["input_ids"], tuned.tokenizer.eos_token_id]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    streamer.finish()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert "漢" in pieces and "🙂" in pieces


def test_closing_the_answer_ends_the_writing(tuned: Chatter) -> None:
    steps = []
    hook = tuned.model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        pieces = replace(tuned, stops=[]).reply([user("hello")], True, Sampling(0, 400))
        assert next(pieces)
        pieces.close()
        assert not writing()
        done = len(steps)
        assert done < 200
        time.sleep(0.2)
        assert len(steps) == done
    finally:
        hook.remove()
    assert said(tuned, [user("hello")]) == generated(tuned.model, tuned.tokenizer, [user("hello")]), "adapter back on"


def test_an_error_while_writing_reaches_the_reader(tuned: Chatter, monkeypatch) -> None:
    def fails(error: BaseException):
        def generate(streamer, **how) -> None:
            streamer.put(torch.tensor([[5]]))
            streamer.put(torch.tensor([70]))
            raise error

        monkeypatch.setattr(tuned.model, "generate", generate)
        return tuned.reply([user("hi")], True, GREEDY)

    pieces = fails(RuntimeError("it broke"))
    assert next(pieces)
    with pytest.raises(RuntimeError, match="it broke"):
        next(pieces)
    with pytest.raises(RunError, match=r"out of memory on cpu at a conversation of \d+ tokens"):
        list(fails(torch.OutOfMemoryError()))
    monkeypatch.undo()
    assert said(tuned, [user("hi")]) == generated(tuned.model, tuned.tokenizer, [user("hi")]), "adapter back on"
    assert not writing()


def test_temperature_draws_and_the_length_is_kept(tuned: Chatter) -> None:
    drawn = {said(tuned, [user("hi")], True, Sampling(temperature=2.0, max_new_tokens=20)) for _ in range(3)}
    assert len(drawn) > 1
    assert said(tuned, [user("hi")], True, Sampling(1e-30, 12)) == said(tuned, [user("hi")], True)


def test_a_conversation_may_not_be_longer_than_the_context(tuned: Chatter) -> None:
    with pytest.raises(UserError, match=r"the conversation has [\d,]+ tokens, and the context of .* is 512"):
        tuned.reply([user("z" * 600)], False, GREEDY)
    nearly = [user("z" * 480)]
    room = 512 - len(tuned._prompt(nearly))
    assert 0 < room < 60
    assert said(tuned, nearly, settings=Sampling(0, 400)) == generated(tuned.model, tuned.tokenizer, nearly, room)


def test_what_the_template_refuses_is_the_users_mistake(tuned: Chatter, monkeypatch) -> None:
    monkeypatch.setattr(tuned.tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match=r"rejects this conversation \(system, user\): System role") as caught:
        tuned.reply([SYSTEM, user("hi")], False, GREEDY)
    assert "leave out --system" in caught.value.hint


# The conversation


def test_the_second_question_knows_the_first_and_each_side_its_own(tuned: Chatter) -> None:
    sides = [Conversation(tuned, base, GREEDY, "be brief") for base in (True, False)]
    for side in sides:
        first = "".join(side.ask("hello"))
        assert side.messages == [SYSTEM, user("hello"), assistant(first)]
        second = "".join(side.ask("a b c"))
        asked = [SYSTEM, user("hello"), assistant(first), user("a b c")]
        assert second == said(tuned, asked, side.base)
        assert second != said(tuned, [SYSTEM, user("a b c")], side.base)
    assert sides[0].messages != sides[1].messages
    sides[0].reset()
    assert sides[0].messages == [SYSTEM] and len(sides[1].messages) == 5


def test_an_answer_cut_short_is_remembered_and_an_empty_one_is_not(tuned: Chatter) -> None:
    side = Conversation(tuned, True, Sampling(0, 100))
    pieces = side.ask("hello")
    first = next(piece for piece in pieces if piece.strip())
    pieces.close()
    assert side.messages[0] == user("hello") and side.messages[1]["content"].endswith(first)
    unheard = Conversation(Parrot(), False, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(unheard.ask("^C"))
    assert unheard.messages == [], "it said nothing"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "gptoss"])
def test_thoughts_are_asked_for_or_left_empty_and_remembered_apart(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes))
    chatter, asked = Chatter(model, tokenizer, name, "a test", []), [user("hi")]
    thoughts, none = (tokenizer.decode(chatter._prompt(asked, think)) for think in (True, False))
    assert thoughts == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if name != "gptoss":  # which has no switch: its answer's channel is named instead
        assert none == tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    trained = Encoder(tokenizer)
    trained.prepare_chats()
    [encoded] = trained(Chat("here", [user("hi"), assistant("hello")]))
    assert tokenizer.decode(encoded.input_ids).startswith(none + "hello")

    turns = [user("hi"), {**assistant("hello"), "reasoning_content": "carry"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    written = tokenizer(whole[len(thoughts) :], add_special_tokens=False)["input_ids"]
    turn = chatter.remembered(asked, Sampling(), written, "as it was shown")
    assert (turn["content"].strip(), turn["reasoning_content"]) == ("hello", "carry")


def test_a_run_on_answers_without_thoughts_is_asked_for_none(run_folder: Path, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(run_folder, tmp_path / "run"))
    manifest = json.loads(folder.manifest.read_text())
    assert manifest["data"]["train"]["given"] == 0 and not load_chat(str(folder.path)).thoughtless
    manifest["data"]["train"]["given"] = manifest["data"]["train"]["sequences"]
    folder.manifest.write_text(json.dumps(manifest))
    assert load_chat(str(folder.path)).thoughtless
    del manifest["data"]["train"]["given"]
    folder.manifest.write_text(json.dumps(manifest))
    assert not load_chat(str(folder.path)).thoughtless


# The command


def test_prompts_are_one_conversation_and_answers_alone_go_to_stdout(tuned: Chatter, run_folder: Path, capfd) -> None:
    assert run("chat", run_folder, "--prompt", "hello", "--prompt", "a b c", *SHORT) == 0
    text, talk = capfd.readouterr()
    side = Conversation(tuned, False, GREEDY)
    expected = [chat_cli.visible("".join(side.ask(question))) for question in ("hello", "a b c")]
    assert text == "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in expected)
    assert "it was trained with a system prompt; set it with --system 'be brief'" in talk
    assert "adapter of a run on" in talk and "Loading weights" not in talk


def test_base_answers_first_each_with_its_label(tuned: Chatter, run_folder: Path, capfd) -> None:
    assert run("chat", run_folder, "--base", "--system", "be brief", "--prompt", "hello", *SHORT) == 0
    text, talk = capfd.readouterr()
    shown = [chat_cli.visible(said(tuned, [SYSTEM, user("hello")], base)) for base in (True, False)]
    base, adapted = (answer if answer.endswith("\n") else f"{answer}\n" for answer in shown)
    assert text == f"base\n{base}\ntuned\n{adapted}"
    assert "system prompt" not in talk and "\x1b[" not in text


def test_without_a_terminal_every_line_is_a_question(tuned: Chatter, run_folder: Path, tmp_path: Path, capfd) -> None:
    lines = "hello\n\na b c\n/reset\na b c\n/exit\nnever asked\n"
    (tmp_path / "questions").write_bytes(lines.encode() + b"\xff\n")
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "questions").open() as file:
        patch.setattr(sys, "stdin", file)
        assert run("chat", run_folder, *SHORT) == 0
    side = Conversation(tuned, False, GREEDY)
    answers = ["".join(side.ask("hello")), "".join(side.ask("a b c"))]
    side.reset()
    answers.append("".join(side.ask("a b c")))
    shown = [chat_cli.visible(answer) for answer in answers]
    text = capfd.readouterr().out
    assert text == "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--temperature", "nan", "--prompt", "x"], "--temperature must be a number"),
        (["--temperature", "-1"], "Invalid value for '--temperature'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--bits", "8"], "Invalid value for '--bits'"),
        (["--base", "--prompt", "x"], "is not an adapter, so there is nothing to compare it with"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tiny_folder: Path, capfd) -> None:
    assert run("chat", tiny_folder, *arguments) == 2
    talk = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert message in talk and "Traceback" not in talk


class Parrot:
    """A chatter that says what it is told to, and is interrupted where that is ^C."""

    origin, has_template, system, thoughtless = "a parrot", True, None, False

    def remembered(self, messages: list, settings: Sampling, written: list[int], text: str) -> dict[str, str]:
        return assistant(text)

    def reply(self, messages: list, base: bool, settings: Sampling, written: list[int]) -> Iterator[str]:
        asked = len([message for message in messages if message["role"] == "user"])
        if messages[-1]["content"] != "^C":
            yield f"{'base' if base else 'tuned'} {asked}: "
        for piece in messages[-1]["content"].partition("^C"):
            if piece == "^C":
                raise KeyboardInterrupt
            if piece == "fail":
                raise UserError("it is too long", "say less")
            yield piece


@pytest.fixture
def parrot(monkeypatch) -> None:
    monkeypatch.setattr(chat_cli, "require_reachable", lambda _: None)
    monkeypatch.setattr(load, "load_chat", lambda *_: Parrot())


def terminal(monkeypatch, width: int, lines: list[str | type[BaseException]] = ()) -> io.StringIO:
    """A terminal in which somebody types these lines, and what is printed there."""
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(chat_cli, "out", Console(force_terminal=True, color_system=None, width=width, height=12))
    typed = iter(lines)

    def type_line(prompt: str) -> str:
        line = next(typed)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return screen


def test_control_characters_are_made_visible_and_tabs_stay(parrot, capfd) -> None:
    assert run("chat", "x", "--prompt", "\x1b[2Jboo\ttab\rend [bold]:smile:") == 0
    assert capfd.readouterr().out == "tuned 1: \\x1b[2Jboo\ttab\\rend [bold]:smile:\n"


def test_wide_terminals_have_columns_and_narrow_ones_do_not(parrot, monkeypatch) -> None:
    screen = terminal(monkeypatch, 100)
    assert run("chat", "x", "--base", "--prompt", "a\x1b[2J " + "word " * 100 + "last") == 0
    text = re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", screen.getvalue())
    lines = [line.split() for line in text.splitlines()]
    assert ["base", "tuned"] in lines
    assert any(line[:3] == ["base", "1:", "a\\x1b[2J"] and "tuned" in line for line in lines)
    assert [line.count("last") for line in lines if line][-1] == 2, "whole at the end, though longer than the screen"
    screen = terminal(monkeypatch, 99)
    assert run("chat", "x", "--base", "--prompt", "short") == 0
    assert [line.strip() for line in screen.getvalue().splitlines()] == [
        "> short", "base", "base 1: short", "", "tuned", "tuned 1: short",
    ]  # fmt: skip


def test_while_it_is_written_the_end_of_each_answer_is_in_sight(monkeypatch) -> None:
    console = Console(width=100, height=10, color_system=None)
    numbers = "\n".join(str(number) for number in range(50))
    columns = chat_cli._Columns({"base": numbers, "tuned": "few words"})
    with console.capture() as capture:
        console.print(columns)
    lines = capture.get().splitlines()
    assert len(lines) == 9 and lines[1].split() == ["42", "few", "words"] and lines[-1].strip() == "49"
    columns.whole = True
    with console.capture() as capture:
        console.print(columns)
    assert len(capture.get().splitlines()) == 51


@pytest.mark.parametrize("width", [80, 120])
def test_ctrl_c_ends_an_answer_and_then_the_talk(width: int, parrot, monkeypatch, capfd) -> None:
    lines = ["one", "two ^C never", "fail", "/nonsense", "  ", "/reset", "three", KeyboardInterrupt, "not reached"]
    screen = terminal(monkeypatch, width, lines)
    assert run("chat", "x", "--base") == 0
    text, talk = screen.getvalue(), capfd.readouterr().err
    for label in ("base", "tuned"):
        assert f"{label} 1: one" in text
        assert f"{label} 2: two" in text
        assert f"{label} 1: three" in text, "forgotten"
    assert "never" not in text and "not reached" not in text
    assert "error: it is too long\n\nhint: say less" in talk
    assert "error: there is no command /nonsense\n\nhint: /reset starts a new conversation, /exit quits" in talk
    assert "/exit or Ctrl-D quits" in talk


def test_ctrl_c_ends_it_all_where_nobody_types(parrot, monkeypatch, capfd) -> None:
    assert run("chat", "x", "--prompt", "a ^C b", "--prompt", "c") == 130
    assert capfd.readouterr().out == "tuned 1: a \n"


def test_exit_ends_the_talk(parrot, monkeypatch) -> None:
    screen = terminal(monkeypatch, 80, ["one", "/exit", "not reached"])
    assert run("chat", "x") == 0
    assert screen.getvalue().split() == ["tuned", "1:", "one"]


def test_a_talk_in_a_terminal(run_folder: Path) -> None:
    """The real thing, through a pseudo-terminal: an answer, /reset, Ctrl-C on half a line, Ctrl-D."""
    talk = seen = ""

    def see(mark: str) -> None:
        """Read on until this is on the screen, and forget the screen so far."""
        nonlocal talk, seen
        end = time.monotonic() + 60
        while mark not in talk and time.monotonic() < end:
            if select.select([screen], [], [], 0.2)[0]:
                talk += os.read(screen, 65536).decode("utf-8", "replace")
        assert mark in talk, seen + talk
        before, _, talk = talk.partition(mark)
        seen += before + mark

    def type_keys(keys: str) -> None:
        os.write(screen, keys.encode())

    with in_a_terminal(["chat", run_folder, *SHORT]) as (process, screen):
        see("> ")
        type_keys("hello\n")
        see("hello")
        see("> ")
        type_keys("/reset\n")
        see("new conversation")
        see("> ")
        type_keys("half a line")
        see("half a line")
        time.sleep(0.5)  # Python notices a signal only when it waits for the next key
        type_keys("\x03")
        see("> ")
        type_keys("\x04")
        process.join(30)
        assert process.exitcode == 0
    assert "Traceback" not in seen + talk
