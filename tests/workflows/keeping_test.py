"""What a recipe keeps, in a run: the base's answers, their share of the penalty, and what is measured afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.calibration.sample_cache import SampledModel, read_samples
from folora_q.cli.app import main
from folora_q.data.kept_prompts import KeptSource, kept_sources
from folora_q.data.rendering import Renderer
from folora_q.data.tokens import IGNORED, Batch
from folora_q.evaluation.capability_scores import SCORERS
from folora_q.evaluation.kept import Kept
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.keep import KeepSection
from folora_q.recipe.schema import ModelSection
from folora_q.report.comparison import at_ends
from folora_q.report.page import report_page
from folora_q.report.run_record import load_run
from folora_q.runs.result_files import read_answers, read_evaluation
from folora_q.runs.results import KeptResult
from folora_q.workflows import calibration, keeping
from folora_q.workflows.calibration import Calibration
from folora_q.workflows.keeping import BaseAnswers, from_samples, samples_of_all
from tests.conftest import Silent, save_tiny_model, write_recipe

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
# Short, since the tokens are bytes: tools by name only, calls as Qwen writes them, and a switch for thoughts.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
LENGTH = 5
SECTION = KeepSection(capabilities=["tools", "thinking"], max_new_tokens=LENGTH)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("keep") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model_folder: Path) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(model_folder)), CPU)


@pytest.fixture
def recipe_file(model_folder: Path, tmp_path: Path) -> Path:
    path = write_recipe(tmp_path, model_folder)
    rows = [{"text": f"The lamp of router {i} is green when it is ready and red when it is not."} for i in range(40)]
    (tmp_path / "manual.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = {"capabilities": ["tools", "thinking"], "files": ["manual.jsonl"], "max_new_tokens": LENGTH}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"keep": keep}))
    return path


def sources(base: LoadedModel) -> list[KeptSource]:
    return kept_sources(SECTION, Renderer(base.tokenizer), lambda note: pytest.fail(note))


def answered(base: LoadedModel, progress: Silent | None = None) -> list[Kept]:
    sampled = SampledModel(base.model, base.tokenizer, base.fingerprint, torch.float32)
    return BaseAnswers(sampled, 4, StageTimer(progress or Silent())).kept(sources(base))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def kept_by(folder: Path) -> dict[str, KeptResult]:
    return {result.name: result for result in read_evaluation(folder / "evaluation.json").kept}


def test_answers_are_those_of_plain_transformers(base: LoadedModel) -> None:
    kept = answered(base)
    assert [each.source.name for each in kept] == ["tools", "thinking"]
    end = base.tokenizer.eos_token_id
    for each in kept:
        for prompt, answer in zip(each.source.prompts.held_out, each.held_out_answers, strict=True):
            ids = torch.tensor([prompt.ids])
            mask = torch.ones_like(ids)
            with torch.no_grad():
                output = base.model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=LENGTH, pad_token_id=end
                )
            assert output[0, len(prompt.ids) :].tolist() == answer
        assert len(each.penalty_answers) == len(each.source.prompts.penalty) >= 16


def test_answers_count_and_prompts_do_not(base: LoadedModel) -> None:
    for each in answered(base):
        for (ids, labels), prompt, answer in zip(
            each.penalty, each.source.prompts.penalty, each.penalty_answers, strict=True
        ):
            assert ids == prompt.ids + answer
            assert labels == [IGNORED] * len(prompt.ids) + answer


def test_answers_are_generated_once(base: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answered(base)
    monkeypatch.setattr(keeping, "greedy_tokens", lambda *args: pytest.fail("they are in the cache"))
    progress = Silent()
    assert answered(base, progress) == first
    assert progress.notes == ["the base's answers to the prompts to keep are read from the cache"]


def test_a_damaged_cache_is_answered_again(base: LoadedModel, tmp_path: Path) -> None:
    first = answered(base)
    files = sorted((tmp_path / "cache" / "keep").glob("*.jsonl"))
    assert len(files) == 4  # two halves of two capabilities
    for number, file in enumerate(files):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text(["", "no JSON", "".join(lines[1:]), "".join(lines[::-1])][number])
    assert answered(base) == first


def test_the_file_of_a_run_has_every_answer(base: LoadedModel) -> None:
    kept = answered(base)
    samples = samples_of_all(kept)
    assert from_samples(sources(base), samples) == kept
    assert from_samples(sources(base), samples[:-1]) is None


def shares_of(base: LoadedModel, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[Batch]:
    """The text that Σp is collected of."""
    found: list[Batch] = []

    def collect(model: PeftModel, penalty: list[Batch], *rest: object) -> dict:
        found.extend(penalty)
        return {}

    monkeypatch.setattr(calibration, "build_gates", collect)
    recipe = load_recipe(recipe_file, overrides)
    task = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 8)
    timer = StageTimer(Silent())
    kept = answered(base)
    with_kept = Calibration(recipe, base.tokenizer, task, timer, on_gpu=False, kept=kept)
    with_kept.gates(base.model, [calibration.ProxySample(list(range(3, 40)), "bos")] * 3)
    return found


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_each_capability_has_an_equal_part_of_the_share(
    base: LoadedModel, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    text = shares_of(base, recipe_file, monkeypatch, f"keep.share={share}", "proxy.public_share=0.25")
    labelled = [int((batch.labels != IGNORED).sum()) for batch in text]
    assert sum(batch.weight * count for batch, count in zip(text, labelled, strict=True)) == pytest.approx(
        sum(labelled)
    )
    by_weight: dict[float, float] = {}
    for batch, count in zip(text, labelled, strict=True):
        by_weight[batch.weight] = by_weight.get(batch.weight, 0) + batch.weight * count / sum(labelled)
    expected = [share / 2, share / 2, (1 - share) * 0.25, (1 - share) * 0.75]
    assert sorted(by_weight.values()) == pytest.approx(sorted(expected))


def test_without_a_share_the_penalty_is_as_without_keep(
    base: LoadedModel, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shares_of(base, recipe_file, monkeypatch, "keep.share=0")
    assert all(batch.weight == 1 for batch in text)
    assert sum(len(batch.input_ids) for batch in text) == 6  # three samples and their crops


def test_a_run_keeps_and_measures(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("train", recipe_file) == 0
    captured = capfd.readouterr()
    printed, found = captured.out, kept_by(tmp_path / "run")
    assert list(found) == ["tools", "thinking", "manual"]
    assert all(result.texts == 20 and result.kl.bounds is not None for result in found.values())
    assert found["manual"].score is None and found["tools"].score.change.bounds is not None
    for line in (
        "keep, tools: parsable",
        "keep, thinking:",
        "keep, manual: KL",
        "Of what should be kept, nothing fell",
    ):
        assert line in printed
    assert "answers to keep" in captured.err
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| keep, tools: parsable tool call, 20 prompts |" in card and "| keep, manual: KL from the base |" in card
    recorded = load_run(tmp_path / "run")
    page = report_page(recorded).html
    assert 'data-kept="tools"' in page and 'data-kept="manual"' in page
    labels = [row.label for row in at_ends([recorded])]
    assert [label for label in labels if label.startswith("keep")] == [
        *("keep, tools: parsable tool call", "keep, tools: KL", "keep, thinking: closed thought", "keep, thinking: KL"),
        "keep, manual: KL",
    ]
    answers = [answer for answer in read_answers(tmp_path / "run" / "answers.jsonl") if answer.kind == "keep"]
    assert [answer.capability for answer in answers] == ["tools"] * 20 + ["thinking"] * 20


def test_the_kl_is_that_of_plain_peft(recipe_file: Path, tmp_path: Path, model_folder: Path) -> None:
    assert run("train", recipe_file) == 0
    folder = tmp_path / "run"
    samples = [sample for sample in read_samples(folder / "keep.jsonl", 10**6) if sample.source == "thinking"]
    [source] = [
        each
        for each in sources(load_model(ModelSection(model_name_or_path=str(model_folder)), CPU))
        if each.name == "thinking"
    ]
    base = load_model(ModelSection(model_name_or_path=str(model_folder)), CPU).model
    tuned = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, count = 0.0, 0
    held_out = zip(source.prompts.held_out, samples[len(source.prompts.penalty) :], strict=True)
    for prompt, sample in held_out:
        ids, at = torch.tensor([sample.ids]), slice(len(prompt.ids) - 1, len(sample.ids) - 1)
        with torch.no_grad():
            q = tuned(input_ids=ids).logits[0, at].double().log_softmax(-1)
            with tuned.disable_adapter():
                p = tuned(input_ids=ids).logits[0, at].double().log_softmax(-1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert kept_by(folder)["thinking"].kl.value == pytest.approx(total / count, rel=1e-3) and total > 0


def test_keeping_changes_the_gates_and_measuring_alone_does_not(recipe_file: Path, tmp_path: Path) -> None:
    adapters = []
    for name, override in (("kept", "keep.share=0.5"), ("measured", "keep.share=0"), ("neither", "keep=[]")):
        assert (
            run(
                "train",
                recipe_file,
                override,
                f"training.output_dir={tmp_path / name}",
                "keep.max_new_tokens=2" if name != "neither" else "training.seed=0",
            )
            == 0
        )
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[1] == adapters[2] != adapters[0]
    assert kept_by(tmp_path / "measured").keys() == kept_by(tmp_path / "kept").keys() and not kept_by(
        tmp_path / "neither"
    )


def test_without_a_gate_capabilities_are_measured(recipe_file: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "gate.enabled=false", "keep=[thinking]", "keep.max_new_tokens=3") == 0
    assert list(kept_by(tmp_path / "run")) == ["thinking"]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["keep.files=[]", "training.save_steps=2"]
    assert run("train", recipe_file, *settings, f"training.output_dir={tmp_path / 'whole'}") == 0
    from folora_q.training.trainer import GatedTrainer

    step = GatedTrainer.training_step

    def interrupted(self: GatedTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 3 and self.callback_handler.train_dataloader is not None:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GatedTrainer, "training_step", interrupted)
        assert run("train", recipe_file, *settings) == 130
    for file in (tmp_path / "cache" / "keep").glob("*"):
        file.unlink()  # the answers come from the run itself
    with monkeypatch.context() as patch:
        patch.setattr(BaseAnswers, "kept", lambda *args: pytest.fail("the run has the answers"))
        assert run("train", recipe_file, *settings, "--resume") == 0
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1] and kept_by(tmp_path / "run") == kept_by(tmp_path / "whole")


def test_a_changed_file_is_noticed_when_a_run_is_resumed(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe_file, "keep.capabilities=[]") == 0
    manifest = json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "interrupted"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    with (tmp_path / "manual.jsonl").open("a") as file:
        file.write('{"text": "The lamp of the last router is blue, and nobody knows what it means."}\n')
    assert run("train", recipe_file, "keep.capabilities=[]", "--resume") == 2
    assert "manual.jsonl: SHA-256" in capfd.readouterr().err


def test_eval_measures_what_is_named_and_fails_under_limits(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe_file, "keep.files=[]") == 0
    folder = tmp_path / "run"
    before = kept_by(folder)
    assert run("eval", folder, "--output", tmp_path / "again") == 0
    assert kept_by(tmp_path / "again") == before
    limits = tmp_path / "keep.yaml"
    limits.write_text("thinking: {kl: 100}\n")
    assert run("eval", folder, "--keep", "thinking", "--fail-under", limits, "--output", tmp_path / "one") == 0
    assert kept_by(tmp_path / "one") == {"thinking": before["thinking"]}
    limits.write_text(f"thinking: {{kl: {before['thinking'].kl.value / 2}}}\nrefusals: 1.0\n")
    capfd.readouterr()
    assert run("eval", folder, "--keep", "thinking", "--fail-under", limits, "--output", tmp_path / "two") == 1
    printed = capfd.readouterr()
    assert "thinking has a KL of" in printed.err and "refusals scores 0.0%, below 100.0%" in printed.err
    assert list(kept_by(tmp_path / "two")) == ["thinking", "refusals"]  # written before it failed
    assert run("eval", folder, "--keep", "thoughts") == 2


def test_validate_says_what_is_kept_and_what_is_left_out(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("validate", recipe_file) == 0
    printed = capfd.readouterr().out
    assert "tools, thinking, manual.jsonl, 20% of the penalty" in printed and "left out" not in printed
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    assert run("validate", recipe_file, "data.chat_template=plain.jinja", "keep.share=0") == 0
    printed = capfd.readouterr().out
    assert "only measured (keep.share: 0)" in printed
    assert "keep: tools is left out: the chat template has no tools" in printed
    (tmp_path / "manual.jsonl").write_text('{"question": "hi"}\n')
    for command in ("validate", "train"):
        assert run(command, recipe_file) == 2
        assert "line 1: it has no prompt and no text" in capfd.readouterr().err


def test_scores_are_those_of_the_answers(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that accepts half of the base's answers and none of the tuned model's: the row says so."""
    seen: list[int] = []

    def scorer(answer: object) -> float:
        seen.append(1)
        return float(len(seen) % 4 == 1)  # base, tuned, base, tuned: every second base

    monkeypatch.setitem(SCORERS, "thinking", scorer)
    assert run("train", recipe_file, "keep=[thinking]", "keep.max_new_tokens=2") == 0
    score = kept_by(tmp_path / "run")["thinking"].score
    assert (score.base.value, score.tuned.value, score.change.value) == (0.5, 0.0, -0.5)
    assert score.change.high < 0 and math.isfinite(score.change.low)


def test_capabilities_of_an_adapter_of_plain_peft_are_measured(model_folder: Path, tmp_path: Path) -> None:
    """No recipe and no run: lengths of answers are those of the capability."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "foreign")
    keep = ("--keep", "arithmetic", "--samples", 4, "--output", tmp_path / "found")
    assert run("eval", tmp_path / "foreign", *keep) == 0
    [result] = kept_by(tmp_path / "found").values()
    assert result.name == "arithmetic" and result.texts == 24 and result.kl.value > 0
