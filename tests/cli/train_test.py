"""The main job through the command line, on a tiny model: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from folora_q import pipeline
from folora_q.cli.app import main
from folora_q.data.templates import read_template
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.recipe import load_recipe
from folora_q.statistics.store import load_gates


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text("utf-8"))


def named_files(text: str) -> list[str]:
    """What the last lines of a run tell the user to read."""
    return [line.split()[1] for line in text.splitlines() if line.lstrip().startswith("less ")]


def test_a_run_leaves_everything_that_was_promised(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file) == 0
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter",
        "answers.jsonl",
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
    assert saved["forgetting"] == saved["after"]["general_loss"] - saved["before"]["general_loss"]
    assert saved["divergence"]["start"]["kl_nats_per_token"] > 0
    assert saved["divergence"]["crops"]["tokens"] > 0
    assert saved["after"]["task_loss"] < saved["before"]["task_loss"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["before", "training", "training", "training", "training", "after"]
    samples = [json.loads(line) for line in (folder / "proxy.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 6
    assert len((folder / "answers.jsonl").read_text("utf-8").splitlines()) == 4
    assert len(load_gates(folder / "gates.safetensors")) == 14
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert f"{saved['after']['task_loss']:.4f}" in card
    assert "gated (step rule at a_start, a_step, b_step; λ = 16" in card

    text, talk = capfd.readouterr()
    assert [Path(line).exists() for line in named_files(text)] == [True] * 3
    assert "What was learned, what was forgotten (gated QLoRA)" in text
    assert f"{saved['after']['task_loss']:.3f}" in text
    assert f"chat {folder} --base" in text and f"merge {folder}\n" in text
    assert "✓ training" in talk
    assert "\x1b[" not in text + talk, "no colours without a terminal"
    for noise in ("Loading weights", "Tokenizing", "Warning", "it/s", "kernels-community", "Writing model"):
        assert noise not in text + talk

    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert resolved.model_dump() == load_recipe(recipe_file).model_dump()


def test_what_to_type_next_exists_and_keeps_the_overrides(recipe_file: Path, tmp_path: Path, capfd) -> None:
    changes = ["evaluation.metric=none", "training.max_steps=1", "gate.places=[a_start, a_step]"]
    assert run("train", recipe_file, *changes) == 0
    text = capfd.readouterr().out
    assert [Path(line).exists() for line in named_files(text)] == [True] * 2
    [line] = [line for line in text.splitlines() if "gate.enabled=false" in line]
    plain = shlex.split(line)
    assert run(*plain[plain.index("train") :]) == 0
    resolved = load_recipe(tmp_path / "run-plain" / "recipe.resolved.yaml")
    assert (resolved.gate.enabled, resolved.training.max_steps) == (False, 1)


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
    saved = manifest(tmp_path / "run")
    assert before == pytest.approx(saved["before"]["task_loss"], rel=0.1)  # four rows that differ in a digit
    assert after == pytest.approx(saved["after"]["task_loss"], rel=0.1)
    assert after < 0.9 * before


def test_gate_off_is_the_same_run_without_statistics(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, "gate.enabled=false", f"training.output_dir={tmp_path / 'plain'}") == 0
    assert run("train", recipe_file) == 0
    text, talk = capfd.readouterr()
    assert "(plain QLoRA)" in text
    assert not (tmp_path / "plain" / "gates.safetensors").exists()
    assert "sampled text taken from" in talk, "the second run must find the first one's proxy text"
    plain, gated = manifest(tmp_path / "plain"), manifest(tmp_path / "run")
    assert plain["before"] == gated["before"]
    assert plain["after"] != gated["after"]
    assert (tmp_path / "plain" / "proxy.jsonl").read_bytes() == (tmp_path / "run" / "proxy.jsonl").read_bytes()


def test_the_papers_gate_runs_from_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    paper = ["gate.rule=spectral", "gate.gate_lambda=1", "gate.floor=0.3", "gate.places=[a_start,a_step]"]
    assert run("train", recipe_file, *paper, "evaluation.metric=none") == 0
    assert "spectral rule" in (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")
    gate = next(iter(load_gates(tmp_path / "run" / "gates.safetensors").values()))
    assert (gate.gate_lambda, gate.floor) == (1.0, 0.3)
    assert float(gate.values.min()) >= 0.3


def test_held_out_text_is_never_used_for_statistics(recipe_file: Path, monkeypatch) -> None:
    used: dict[str, list] = {}

    def spy(model, pairs, proxy, task, section, done):
        used["proxy"], used["task"] = ([b.input_ids for b in batches] for batches in (proxy, task))
        return build_gates(model, pairs, proxy, task, section, done)

    def spy_measure(model, tokenizer, on, section, done):
        used["held out"] = [b.input_ids for b in (*on.task, *on.proxy_start)]
        return measure(model, tokenizer, on, section, done)

    build_gates, measure = pipeline.build_gates, pipeline.measure
    monkeypatch.setattr(pipeline, "build_gates", spy)
    monkeypatch.setattr(pipeline, "measure", spy_measure)
    assert run("train", recipe_file, "training.max_steps=1") == 0

    def rows(batches: list) -> set[tuple]:
        return {tuple(row) for ids in batches for row in (ids[i][ids[i] != 0].tolist() for i in range(len(ids)))}

    assert len(rows(used["task"])) == 6
    assert len(rows(used["held out"])) == 4 + 2
    assert not (rows(used["proxy"]) | rows(used["task"])) & rows(used["held out"])


def test_a_typo_is_one_line_before_anything_is_loaded(recipe_file: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "run_training", lambda *a: pytest.fail("must not start"))
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
    assert "holds a run already" in capfd.readouterr().err
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert run("train", *quick, "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert run("train", *quick, f"training.output_dir={tmp_path / 'mine'}", "--overwrite") == 2
    assert "holds files that are no run" in capfd.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_failure_is_one_line_and_its_folder_says_so(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, "model.model_name_or_path=no/such-model") == 2
    assert "error: cannot load the model no/such-model" in capfd.readouterr().err
    assert not (tmp_path / "run").exists(), "found before anything is written"
    assert run("train", recipe_file, "training.learning_rate=1e30") == 1
    talk = capfd.readouterr().err
    assert "error: the training loss is" in talk and "hint: lower training.learning_rate" in talk
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_mistake_leaves_the_old_run_alone(recipe_file: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "evaluation.metric=none", "training.max_steps=1") == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert run("train", recipe_file, "model.model_name_or_path=no/such-model", "--overwrite") == 2
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_the_best_step_is_kept_and_measured_on_the_way(recipe_file: Path, tmp_path: Path, capfd) -> None:
    # At this rate the first steps learn and the last ones destroy.
    changes = ["evaluation.metric=none", "evaluation.steps=2", "training.max_steps=8", "training.learning_rate=0.3"]
    changes += ["training.load_best_model_at_end=true", "training.warmup_steps=0", "gate.enabled=false"]
    changes += ["training.lr_scheduler_type=constant", "training.save_total_limit=8"]
    assert run("train", recipe_file, *changes) == 0
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.__getitem__)
    assert best != 8, "the test needs a best step that is not the last"
    assert f"kept step {best}, with the least held-out loss: {losses[best]:.4f}" in capfd.readouterr().err
    assert manifest(folder)["after"]["task_loss"] == pytest.approx(losses[best], rel=1e-6)
    kept, saved = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", f"checkpoint-{best}"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert not (folder / "README.md").exists()
    assert run("train", recipe_file, "training.max_steps=1", "evaluation.metric=none", "--overwrite") == 0
    assert not list(folder.glob("checkpoint-*"))


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
    assert saved["after"]["task_loss"] < saved["before"]["task_loss"]
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
    assert len(answers) == 3
    assert {answer["reference"] for answer in answers} <= {str(i) for i in range(1, 13)}


def test_outside_the_environment_the_script_says_what_to_do() -> None:
    script = Path(__file__).parents[2] / "cli.py"
    done = subprocess.run([sys.executable, "-S", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not installed" in done.stderr and "make setup" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_run_says_so(recipe_file: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    endless = ["training.max_steps=1000000", "evaluation.metric=none", "gate.enabled=false"]
    command = [sys.executable, "-m", "folora_q", "train", recipe_file, *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and '"training"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(sent)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == code
    assert "error: interrupted\n" in output and "Traceback" not in output
    assert f"hint: what had been written is in {tmp_path / 'run'}, marked as interrupted" in output
    assert manifest(tmp_path / "run")["status"] == "interrupted"
