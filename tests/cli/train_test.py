"""The main job through the command line, on a tiny model: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from folora_q.calibration.gate_store import load_gates
from folora_q.cli.app import main
from folora_q.data.templates import read_template
from folora_q.models import logits
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe import load_recipe
from folora_q.runs.result_files import read_answers, read_evaluation, read_gate_results
from folora_q.runs.results import Evaluation, TextKind
from folora_q.training.trainer import GatedTrainer
from folora_q.workflows import calibration, train, training_run
from tests.forked import forked, wait_until


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text("utf-8"))


def measured(folder: Path) -> Evaluation:
    return read_evaluation(folder / "evaluation.json")


def assert_plain_lines_of_training(talk: str) -> None:
    """Check what a run of five steps, logged every other, prints without a terminal."""
    assert talk.isascii() and not set("\r\x1b\b") & set(talk)
    lines = talk.splitlines()
    assert "  12 rows (400 tokens) x 1.67 epochs / batch of 4 = 5 steps; 8,192 of 115,648 parameters trained" in lines
    start, done = (
        lines.index("[start] training (5 steps)"),
        lines.index(next(line for line in lines if line.startswith("[done] training, "))),
    )
    steps = lines[start + 1 : done]
    number, time = r"[\d.]+(e-\d)?", r"(\d+:)?\d+:\d\d"
    form = (
        rf"  step (\d)/5  loss {number}  lr {number}  grad norm {number}( {{2}}\d+ tok/s)?  memory {number}/{number} GB"
    )
    shown = [re.fullmatch(rf"{form}  elapsed {time}(  left {time})?", line) for line in steps]
    assert [match and match[1] for match in shown] == ["1", "2", "4"], steps
    assert "tok/s" not in steps[0] and "left" not in steps[0], "the first step tells no speed"
    assert "tok/s" in steps[1] and "left" in steps[1]
    [sentence] = [line for line in lines if line.startswith("  before and after training: ")]
    assert re.search(
        r"equals about [\d.]+ times the training itself \(sampling .*, statistics .*, evaluation ", sentence
    )
    assert "[start] sampling text from the base model (6 texts)" in lines


def test_a_run_leaves_everything_that_was_promised(recipe_file: Path, tmp_path: Path, capfd) -> None:
    packaged = "evaluation.general_text=null"
    assert run("train", recipe_file, packaged) == 0
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter",
        "answers.jsonl",
        "evaluation.json",
        "gates.json",
        "gates.safetensors",
        "metrics.jsonl",
        "proxy.jsonl",
        "recipe.resolved.yaml",
        "run.json",
    ]
    saved = manifest(folder)
    assert saved["status"] == "complete"
    assert saved["seeds"] == {"training": 0, "proxy": 0}
    assert {"torch", "peft", "trl", "bitsandbytes", "folora-q", "python"} <= set(saved["versions"])
    assert len(saved["data_sha256"]) == 2
    assert saved["model"]["fingerprint"]
    stages = {stage["title"]: stage for stage in saved["stages"]}
    assert {"reading the data", "statistics of both texts", "training"} <= stages.keys()
    assert stages["training"]["seconds"] > 0

    found = measured(folder)
    assert [text.name for text in found.texts] == [
        "task",
        "generated text",
        "generated text, cut",
        "prose",
        "manual",
        "code",
    ]
    assert found.text("generated text").kl.value > 0 and found.text("generated text").texts == 2
    assert found.text("task").loss.change.value < 0
    assert found.text("task").tokens == 40, "of four rows the completions and their end"
    assert found.score.answers == 4
    assert len(found.layers) == 14
    for layer in found.layers:
        assert set(layer.drift) == set(layer.predicted) == {TextKind.GENERATED, "task"}
        assert layer.update_norm > 0 and 0 < layer.energy_kept["a"] < 1.5
    gates = read_gate_results(folder / "gates.json")
    assert sorted(name for gate in gates for name in gate.modules) == sorted(layer.name for layer in found.layers)
    assert all(0 < gate.mean_value < 1 and gate.gate_lambda == 64 for gate in gates)
    assert all(gate.penalty > 0 and gate.heldout_penalty > 0 for gate in gates)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["training"] * 4
    samples = [json.loads(line) for line in (folder / "proxy.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 6
    answers = read_answers(folder / "answers.jsonl")
    assert [answer.kind for answer in answers] == ["task"] * 4 + ["general"] * 6
    assert [answer.asked for answer in answers[:4]] == [f"say {i}" for i in range(20, 24)]
    assert len(load_gates(folder / "gates.safetensors")) == 14
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert f"{found.text('task').loss.tuned.value:.4f}" in card
    assert "gated (step at a_start, a_step, b_step; λ = 64" in card

    text, talk = capfd.readouterr()
    assert "What was learned, what was forgotten (gated QLoRA)" in text
    assert f"{found.text('task').loss.tuned.value:.4f}" in text
    assert f"chat {folder} --base" in text and f"merge {folder}\n" in text
    assert_plain_lines_of_training(talk)
    assert re.search(
        r"penalty of A's directions on held-out model-generated text: [\d.e+]+ times the in-sample penalty", talk
    )
    assert "\x1b[" not in text + talk, "no colours without a terminal"
    for noise in ("Loading weights", "Tokenizing", "Warning", "it/s", "kernels-community", "Writing model"):
        assert noise not in text + talk

    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert resolved.model_dump() == load_recipe(recipe_file, [packaged]).model_dump()


def test_the_three_commands_to_run_next_are_named_with_the_runs_path_and_run(recipe_file: Path, capfd) -> None:
    folder = recipe_file.parent / "a run"
    quick = ["evaluation.metric=none", "gate.enabled=false", "training.max_steps=1"]
    assert run("train", recipe_file, *quick, f"training.output_dir={folder}") == 0
    text = capfd.readouterr().out
    following = [line for line in text[text.index("Next  (") :].splitlines()[1:] if "#" not in line]
    commands = [shlex.split(line) for line in following]
    assert [words[-len(rest) - 1 :] for words, rest in zip(commands, [("",), ("", ""), ("",)], strict=True)] == [
        ["report", str(folder)],
        ["chat", str(folder), "--base"],
        ["merge", str(folder)],
    ]
    for words in (commands[0], commands[2]):
        assert run(*words[words.index(str(folder)) - 1 :]) == 0
    assert (folder / "report.html").exists() and (folder / "merged" / "config.json").exists()


def test_plain_peft_loads_the_adapter_and_gets_the_measured_loss(recipe_file: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "evaluation.metric=none") == 0
    recipe = load_recipe(recipe_file)
    base = load_model(recipe.model, choose_hardware("float32"))
    tuned = PeftModel.from_pretrained(base.model, tmp_path / "run" / "adapter").eval()
    text = "<|im_start|>user\nsay 20<|im_end|>\n<|im_start|>assistant\nit is 20<|im_end|>\n"
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    labels = ids.clone()
    labels[:, : ids.shape[1] - len("it is 20") - 2] = -100
    with torch.no_grad():
        with tuned.disable_adapter():
            before = float(tuned(input_ids=ids, labels=labels).loss)
        after = float(tuned(input_ids=ids, labels=labels).loss)
    loss = measured(tmp_path / "run").text("task").loss
    assert before == pytest.approx(loss.base.value, rel=0.1)  # four rows that differ in a digit
    assert after == pytest.approx(loss.tuned.value, rel=0.1)
    assert after < 0.9 * before


def test_gate_off_is_the_same_run_without_statistics(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, "gate.enabled=false", f"training.output_dir={tmp_path / 'plain'}") == 0
    assert run("train", recipe_file) == 0
    text, talk = capfd.readouterr()
    assert "(plain QLoRA)" in text
    assert not (tmp_path / "plain" / "gates.safetensors").exists()
    assert "sampled text read from" in talk, "the second run must find the first one's proxy text"
    plain, gated = measured(tmp_path / "plain"), measured(tmp_path / "run")
    for of_plain, of_gated in zip(plain.texts, gated.texts, strict=True):
        assert of_plain.loss.base == of_gated.loss.base
        assert of_plain.loss.tuned != of_gated.loss.tuned
    assert not any(layer.energy_kept or layer.predicted for layer in plain.layers)
    assert (tmp_path / "plain" / "proxy.jsonl").read_bytes() == (tmp_path / "run" / "proxy.jsonl").read_bytes()


def test_the_papers_gate_runs_from_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    paper = ["gate.rule=spectral", "gate.gate_lambda=1", "gate.floor=0.3", "gate.places=[a_start,a_step]"]
    assert run("train", recipe_file, *paper, "evaluation.metric=none") == 0
    assert "spectral at" in (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")
    gate = next(iter(load_gates(tmp_path / "run" / "gates.safetensors").values()))
    assert (gate.gate_lambda, gate.floor) == (1.0, 0.3)
    assert float(gate.values.min()) >= 0.3


def test_held_out_text_is_never_used_for_statistics(recipe_file: Path, monkeypatch) -> None:
    used: dict[str, list] = {}

    def spy(model, proxy, task, *rest):
        used["proxy"], used["task"] = ([b.input_ids for b in batches] for batches in (proxy, task))
        return build_gates(model, proxy, task, *rest)

    def spy_evaluate(model_pair, on, *rest):
        held_out = [text for text in on.texts if text.name in ("task", "generated text")]
        used["held out"] = [batch.input_ids for text in held_out for batch in text.batches]
        return evaluate(model_pair, on, *rest)

    build_gates, evaluate = calibration.build_gates, training_run.evaluate
    monkeypatch.setattr(calibration, "build_gates", spy)
    monkeypatch.setattr(training_run, "evaluate", spy_evaluate)
    assert run("train", recipe_file, "training.max_steps=1") == 0

    def rows(batches: list) -> set[tuple]:
        return {tuple(row) for ids in batches for row in (ids[i][ids[i] != 0].tolist() for i in range(len(ids)))}

    assert len(rows(used["task"])) == 6
    assert len(rows(used["held out"])) == 4 + 2
    assert not (rows(used["proxy"]) | rows(used["task"])) & rows(used["held out"])


def test_a_typo_is_one_line_before_anything_is_loaded(recipe_file: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(train, "run_training", lambda *a: pytest.fail("must not start"))
    recipe_file.write_text(recipe_file.read_text() + "gates: {}\n")
    assert run("train", recipe_file) == 2
    text, talk = capfd.readouterr()
    line = len(recipe_file.read_text().splitlines())
    assert talk.startswith(f"error: unknown key `gates`; did you mean `gate`? ({recipe_file} line {line})\n")
    assert "Traceback" not in talk and not text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "No such command"),
        (["train"], 2, "Missing argument"),
        (["train", "gone.yaml"], 2, "no recipe at gone.yaml"),
        (["--version"], 0, ""),
    ],
)
def test_exit_codes(arguments: list[str], code: int, message: str, capfd) -> None:
    assert run(*arguments) == code
    assert message in "".join(capfd.readouterr())


def test_a_finished_run_is_not_overwritten_unasked_and_foreign_files_never(
    recipe_file: Path, tmp_path: Path, capfd
) -> None:
    quick = [recipe_file, "training.max_steps=1", "evaluation.metric=none", "gate.enabled=false"]
    assert run("train", *quick) == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert run("train", *quick) == 2
    assert "already holds a run" in capfd.readouterr().err
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert run("train", *quick, "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert run("train", *quick, f"training.output_dir={tmp_path / 'mine'}", "--overwrite") == 2
    assert "holds files that are not a run" in capfd.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_failure_is_one_line_and_its_folder_says_so(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, "model.model_name_or_path=no/such-model") == 2
    assert "error: the model no/such-model is not in the hub's cache" in capfd.readouterr().err
    assert not (tmp_path / "run").exists(), "found before anything is written"
    assert run("train", recipe_file, "training.learning_rate=1e30") == 1
    talk = capfd.readouterr().err
    assert "error: 3 steps in a row could not be taken, the last of them step 4 (loss nan, " in talk
    assert "hint: lower training.learning_rate" in talk
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_head_that_we_do_not_know_is_refused_before_anything_is_sampled(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    known = logits.head_logits
    monkeypatch.setattr(logits, "head_logits", lambda *args: known(*args) * 1.1)
    assert run("train", recipe_file) == 1
    assert "LlamaForCausalLM cannot be computed in chunks" in capfd.readouterr().err
    assert not (tmp_path / "run" / "proxy.jsonl").exists()


def test_a_mistake_leaves_the_old_run_alone(recipe_file: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "evaluation.metric=none", "training.max_steps=1") == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert run("train", recipe_file, "model.model_name_or_path=no/such-model", "--overwrite") == 2
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_the_best_step_is_kept_and_measured_on_the_way(recipe_file: Path, tmp_path: Path, capfd) -> None:
    for name, answer in (("train", "a" * 20), ("heldout", "b" * 20)):  # so that each step makes it worse
        talk = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": answer}]
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4, encoding="utf-8")
    changes = ["evaluation.metric=none", "evaluation.steps=2", "training.max_steps=8", "training.learning_rate=0.05"]
    changes += ["training.load_best_model_at_end=true", "training.warmup_steps=0", "gate.enabled=false"]
    changes += ["training.lr_scheduler_type=constant", "training.save_total_limit=8"]
    assert run("train", recipe_file, *changes) == 0
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [0, 2, 4, 6, 8]
    kls = {line["step"]: line["eval_kl"] for line in lines if "eval_loss" in line}
    assert kls[0] == 0 and all(kl > 0 for step, kl in kls.items() if step)
    best = min(list(losses)[1:], key=losses.__getitem__)
    assert best != 8, "the test needs a best step that is not the last"
    talk = capfd.readouterr().err
    assert f"kept step {best}, with the least held-out loss: {losses[best]:.4f}" in talk
    [rise] = [line["eval_rise_prose"] for line in lines if line["step"] == 4 and "eval_loss" in line]
    assert f"  step 0  held-out loss {losses[0]:.4f}  KL 0.0000  real text: prose +0.0000\n" in talk
    change = f"({losses[4] - losses[0]:+.4f})"
    assert f"  step 4  held-out loss {losses[4]:.4f} {change}  KL {kls[4]:.4f}  real text: prose {rise:+.4f}\n" in talk
    found = measured(folder)
    assert found.text("task").loss.tuned.value == pytest.approx(losses[best], rel=1e-5)
    assert found.text("generated text").kl.value > 0
    kept, saved = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", f"checkpoint-{best}"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert not (folder / "README.md").exists()
    assert run("train", recipe_file, "training.max_steps=1", "evaluation.metric=none", "--overwrite") == 0
    assert not list(folder.glob("checkpoint-*"))


def test_where_no_held_out_loss_is_finite_the_last_step_is_kept_and_said(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    """In other tools days of training were lost: a loss of inf or NaN is never the best, so nothing was saved."""
    monkeypatch.setattr(GatedTrainer, "measured_on_task", lambda *_: {"loss": float("nan")})
    quick = ["evaluation.metric=none", "gate.enabled=false", "training.max_steps=2", "evaluation.steps=1"]
    assert run("train", recipe_file, *quick, "training.load_best_model_at_end=true") == 0
    assert "no step is the best, since no held-out loss was finite: the last one is kept" in capfd.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


UNSTABLE = ["training.learning_rate=0.3", "training.lr_scheduler_type=constant", "training.warmup_steps=0"]


def test_a_limit_on_what_is_forgotten_stops_the_run_and_keeps_the_best_within(
    recipe_file: Path, tmp_path: Path, capfd
) -> None:
    quick = ["evaluation.metric=none", "gate.enabled=false", "evaluation.steps=1", "training.save_total_limit=9"]
    quick += ["training.learning_rate=1e-2", "training.lr_scheduler_type=constant", "training.warmup_steps=0"]
    assert run("train", recipe_file, *quick, "training.max_steps=6") == 0
    folder = tmp_path / "run"
    points = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if "eval_kl" in line]
    kls = [point["eval_kl"] for point in points]
    assert kls == sorted(kls), "the test needs a KL that grows"
    limit = (kls[3] + kls[4]) / 2
    capfd.readouterr()
    assert run("train", recipe_file, *quick, "training.max_steps=6", f"evaluation.max_kl={limit}", "--overwrite") == 0
    talk = capfd.readouterr().err
    assert f"stopped at step 4: KL {kls[4]:.4f} is over evaluation.max_kl ({limit})" in talk
    within = {point["step"]: point["eval_loss"] for point in points[1:4]}
    best = min(within, key=within.__getitem__)
    assert f"kept step {best}, with the least held-out loss" in talk
    assert measured(folder).text("task").loss.tuned.value == pytest.approx(within[best], rel=1e-5)

    tiny = f"evaluation.max_kl={kls[1] / 2}"
    assert run("train", recipe_file, *quick, "training.max_steps=6", tiny, "--overwrite") == 1
    assert f"KL from the base was {kls[1]:.4f} at step 1, over evaluation.max_kl" in capfd.readouterr().err
    assert manifest(folder)["status"] == "failed"
    assert not (folder / "adapter").exists()


def test_training_stops_when_the_held_out_loss_no_longer_falls(recipe_file: Path, tmp_path: Path, capfd) -> None:
    quick = ["evaluation.metric=none", "gate.enabled=false", "evaluation.steps=1", "training.max_steps=40"]
    assert run("train", recipe_file, *quick, *UNSTABLE, "training.early_stopping_patience=2") == 0
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = {point["step"]: point["eval_loss"] for point in points if "eval_loss" in point}
    last = max(losses)
    best = min(list(losses)[1:], key=losses.__getitem__)
    assert last == best + 2 < 40
    talk = capfd.readouterr().err
    assert f"stopped at step {last} of 40: the held-out loss no longer fell" in talk
    assert f"kept step {best}" in talk


def test_a_users_metric_needs_a_word_on_the_command_line(recipe_file: Path, tmp_path: Path, capfd) -> None:
    metric = recipe_file.with_name("metric.py")
    metric.write_text("def half(answer, reference):\n    return 0.5\n")
    changes = ["evaluation.metric=function", f"evaluation.metric_function={metric}:half", "training.max_steps=1"]
    assert run("train", recipe_file, *changes) == 2
    assert "a recipe alone cannot run code" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("train", recipe_file, *changes, "--allow-code") == 0
    assert measured(tmp_path / "run").score.score.tuned.value == 0.5
    assert str(metric) in manifest(tmp_path / "run")["data_sha256"]


def test_a_run_shorter_than_its_measurements_keeps_its_last_step(recipe_file: Path, tmp_path: Path, capfd) -> None:
    quick = ["evaluation.metric=none", "gate.enabled=false", "training.max_steps=2"]
    assert run("train", recipe_file, *quick, "evaluation.steps=9", "training.load_best_model_at_end=true") == 0
    assert "kept step 2, with the least held-out loss" in capfd.readouterr().err
    assert run("train", recipe_file, *quick, "evaluation.steps=1", "--overwrite") == 0
    assert "kept" not in capfd.readouterr().err.replace("kept in", "")


def test_the_saved_adapter_follows_the_export_section(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["export.adapter_dtype=bfloat16", "export.base_model_name_or_path=me/tiny", "training.max_steps=1"]
    assert run("train", recipe_file, "evaluation.metric=none", *changes) == 0
    adapter = tmp_path / "run" / "adapter"
    assert {w.dtype for w in load_file(adapter / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"


def test_packed_and_unpacked_rows_train_the_same_tokens(recipe_file: Path, tmp_path: Path, capfd) -> None:
    changes = ["training.packing=true", "training.max_length=96", "evaluation.metric=none", "evaluation.steps=2"]
    assert run("train", recipe_file, *changes) == 0
    assert "packed into" in capfd.readouterr().err
    saved = manifest(tmp_path / "run")
    assert measured(tmp_path / "run").text("task").loss.change.value < 0
    assert saved["data"]["train"]["sequences"] == 12


def test_the_second_run_finds_its_tokens_and_a_changed_row_does_not(recipe_file: Path, tmp_path: Path, capfd) -> None:
    quick = ["training.max_steps=1", "evaluation.metric=none", "gate.enabled=false", "--overwrite"]
    assert run("train", recipe_file, *quick) == 0
    assert "(kept in " in capfd.readouterr().err
    assert run("train", recipe_file, *quick) == 0
    talk = capfd.readouterr().err
    assert talk.count("(found in ") == 2 and "(kept in " not in talk
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text().replace("it is 3", "it is 4"))
    assert run("train", recipe_file, *quick) == 0
    talk = capfd.readouterr().err
    assert talk.count("(found in ") == 1 and talk.count("(kept in ") == 1


def test_a_named_template_goes_with_the_adapter_and_ends_its_answers(tmp_path: Path, recipe_file: Path) -> None:
    from tests.conftest import save_tiny_model

    folder = save_tiny_model(tmp_path / "bare", chat=False)
    changes = [f"model.model_name_or_path={folder}", "training.max_steps=1"]
    assert run("train", recipe_file, *changes) == 2, "no chat template"
    assert run("train", recipe_file, *changes, "data.chat_template=chatml") == 0
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text("utf-8") == read_template("chatml")
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] is not None


def test_debug_shows_the_traceback(recipe_file: Path) -> None:
    from folora_q.errors import UserError

    with pytest.raises(UserError):
        main(["train", str(recipe_file), "gate.rank=none", "--debug"])


def test_dry_run_prints_a_recipe_that_loads(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, "training.learning_rate=2e-4", "--dry-run") == 0
    resolved = yaml.safe_load(capfd.readouterr().out)
    assert resolved["training"]["learning_rate"] == 2e-4
    assert resolved["gate"]["enabled"] is True
    assert not (tmp_path / "run").exists()


def test_a_model_without_bos_and_template_trains_on_prompt_and_completion(tmp_path: Path, recipe_file: Path) -> None:
    from tests.conftest import save_tiny_model

    folder = save_tiny_model(tmp_path / "bare", bos=False, chat=False)
    rows = "".join(json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(12))
    (tmp_path / "train.jsonl").write_text(rows)
    changes = [
        f"model.model_name_or_path={folder}",
        "data.eval_dataset=null",
        "data.eval_size=0.25",
        "proxy.source=bos",
    ]
    assert run("train", recipe_file, *changes) == 0
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    answers = [answer for answer in answers if answer["kind"] == "task"]
    assert len(answers) == 3
    assert {answer["reference"] for answer in answers} <= {str(i) for i in range(1, 13)}


def test_outside_the_environment_the_script_says_what_to_do() -> None:
    script = Path(__file__).parents[2] / "cli.py"
    done = subprocess.run([sys.executable, "-S", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not installed" in done.stderr and "make setup" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupted_run_says_so(recipe_file: Path, tmp_path: Path) -> None:
    endless = ["training.max_steps=20000", "evaluation.metric=none", "gate.enabled=false"]
    output, metrics = tmp_path / "output.txt", tmp_path / "run" / "metrics.jsonl"
    with forked(["train", recipe_file, *endless], output) as process:
        wait_until(lambda: metrics.exists() and '"training"' in metrics.read_text(), process, output)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
    said = output.read_text("utf-8")
    assert "error: interrupted\n" in said and "Traceback" not in said
    assert f"hint: the run is in {tmp_path / 'run'}, marked as interrupted; resume it with\n" in said
    assert said.rstrip().endswith("--resume")
    assert manifest(tmp_path / "run")["status"] == "interrupted"


def test_settings_that_do_not_suit_the_model_are_found_before_the_statistics(recipe_file: Path, capfd) -> None:
    assert run("train", recipe_file, "training.router_aux_loss_coef=0.5") == 2
    talk = capfd.readouterr().err
    assert "this model has no router to balance" in talk and "statistics of both texts" not in talk
