"""Takes a tiny model through all that people do with a model, in one process, and says what came of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from folora_q.chat.load import load_chat
from folora_q.chat.reply import Sampling
from folora_q.cli.app import main
from folora_q.memory.config import read_config
from folora_q.memory.estimate import estimate
from folora_q.memory.shapes import ModelShape, is_known, leaving_out, shape_of
from folora_q.memory.shapes_from_meta import shape_of_parameters
from folora_q.models.gguf import convert_gguf
from folora_q.models.meta import parameter_shapes
from folora_q.models.stored_quantization import stored_quantization
from folora_q.recipe import Recipe
from folora_q.runs.folder import RunFolder
from folora_q.workflows.evaluate import EvaluationRequest, run_evaluation
from folora_q.workflows.merge import MergeRequest, run_merge
from folora_q.workflows.train import TrainingRequest, TrainingResult, run_training
from tests.conftest import Silent
from tests.zoo.members import MEMBERS, Member

IDS = torch.arange(3, 67).reshape(2, 32)
# Two ways to add in float32, relative to what the adapter does.
ROUNDING = 1e-3
QUESTION = [{"role": "user", "content": "say two"}]
ADAPTER = "adapter_model.safetensors"


@dataclass
class Walk:
    """What was found of a member.

    Attributes:
        refused: what `validate` says of it; the rest is empty then.
        adapted: names of the layers that get adapters, from their place in a decoder layer on.
        left: parts of the language model and beside it without adapters, as the run says.
        in_16_bits: parts that are not in 4 bits, as the run says.
        rules: rules of the gate that it was trained with.
    """

    name: str
    member: Member
    refused: str = ""
    adapted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    in_16_bits: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)


def walk(name: str, folder: Path, complete: bool = True) -> Walk:
    """Validate, estimate, train with the default gate and without one, evaluate, merge and chat.

    Args:
        folder: an empty one.
        complete: also resume, and train with the gate's other rules.

    Raises:
        AssertionError: something does not work, or what comes of it is not what it should be.
    """
    member = MEMBERS[name]
    found = Walk(name, member)
    model = member.save(folder / "model")
    recipe = write_recipe(folder, model)
    code, said = command("validate", recipe)
    if member.refused:
        assert code == 2 and member.refused in said and "hint: use " in said, said
        assert command("train", recipe)[0] == command("estimate", recipe)[0] == 2
        message, _, hint = said.removeprefix("error: ").partition("\n\nhint: ")
        found.refused = f"{message}; {hint.strip()}"
        return found
    assert code == 0, said
    assert command("estimate", recipe)[0] == 0

    gated, notes = train(recipe, folder / "gated")
    found.adapted, found.left, found.in_16_bits = _said(notes, gated.folder)
    saved = {"save_steps": 1} if complete else {}
    plain, _ = train(recipe, folder / "plain", gate={"enabled": False}, training=saved)
    plainly = convert_gguf(model) if member.gguf else model  # as transformers reads it
    _check_estimate(Recipe.model_validate(_read(recipe)), gated.folder, plainly)
    if complete:
        _check_resumed(plain.folder)
    for result in (gated, plain):
        trained = load_file(RunFolder(result.folder).adapter / ADAPTER)
        assert all(bool(w.abs().max() > 0) for key, w in trained.items() if "lora_B" in key)
    others = ("step", "spectral") if complete else ()
    for rule in others:
        train(recipe, folder / rule, gate={"rule": rule})
    found.rules = ["frozen", *others]

    outcome = run_evaluation(EvaluationRequest(str(gated.folder)), Silent())
    assert outcome.evaluation.texts == gated.evaluation.texts
    _check_merged(plainly, plain.folder)
    # In float32: the logits of a random model are so close that rounding to 16 bits changes the answer.
    chats = load_chat(str(plain.folder), "float32"), load_chat(str(plain.folder / "merged"), "float32", bits=16)
    said, merged = ("".join(chat.reply(QUESTION, False, Sampling(0, 4))) for chat in chats)
    assert said == merged
    return found


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of two steps, with its data beside it."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(8)
    ]
    for name, some in (("train.jsonl", rows[:6]), ("heldout.jsonl", rows[6:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "prose.txt").write_text("The sea is wide, and the ships that cross it are few. " * 6)
    recipe = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"train_dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "heldout.jsonl")},
        "proxy": {"num_samples": 2, "num_heldout_samples": 1, "max_new_tokens": 16, "public_share": 0},
        "gate": {"rank": 8, "oversampling": 4, "num_task_samples": 4, "refinements": 0},
        "training": {
            "output_dir": str(folder / "run"),
            "learning_rate": 3e-2,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 64,
        },
        "evaluation": {
            "metric": "none",
            "general_text": str(folder / "prose.txt"),
            "num_answers": 1,
            "max_new_tokens": 4,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which YAML takes
    return path


def command(*arguments: object) -> tuple[int, str]:
    """A command's exit code and all that it says."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(list(map(str, arguments)))
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    raise AssertionError("a command always exits")


def train(recipe: Path, folder: Path, **changed: dict[str, Any]) -> tuple[TrainingResult, list[str]]:
    """A run, and the notes that it made."""
    values = _read(recipe)
    for section, keys in changed.items():
        values[section] = values[section] | keys
    values["training"] = values["training"] | {"output_dir": str(folder)}
    progress = Silent()
    return run_training(TrainingRequest(recipe=Recipe.model_validate(values)), progress), progress.notes


def _read(recipe: Path) -> dict[str, Any]:
    return json.loads(recipe.read_text())


def _said(notes: list[str], run: Path) -> tuple[list[str], list[str], list[str]]:
    def parts(begin: str, mark: str) -> list[str]:
        note = next(note for note in notes if note.startswith(begin))
        names = note.partition(mark)[2].removesuffix(" of the weights")
        return [one.partition(" (")[0] for one in names.split(", ")] if names else []

    config = json.loads((RunFolder(run).adapter / "adapter_config.json").read_text())
    keys = load_file(RunFolder(run).adapter / ADAPTER)
    adapted = [_in_layer(key.partition(".lora_")[0]) for key in keys if ".lora_A." in key]
    assert config["peft_type"] == "LORA" and not config.get("target_parameters")
    return list(dict.fromkeys(adapted)), parts("adapters on", "; none on "), parts("in 16 bits", ": ")


def _in_layer(name: str) -> str:
    """self_attn.q_proj of base_model.model.model.layers.0.self_attn.q_proj."""
    pieces = name.split(".")
    last = max((i for i, piece in enumerate(pieces) if piece.isdigit()), default=-1)
    return ".".join(pieces[last + 1 :])


def _check_estimate(recipe: Recipe, run: Path, model: Path) -> None:
    """Count what the estimate counts: weights in 4 bits, and parameters of the adapter."""
    shape = _shape(recipe)
    base = load_4bit(model, AutoConfig.from_pretrained(model))
    packed = [p.quant_state.shape.numel() for p in base.parameters() if isinstance(p, bnb.nn.Params4bit)]
    assert shape.quantized == sum(packed)
    adapter = load_file(RunFolder(run).adapter / ADAPTER)
    trained = sum(weight.numel() for key, weight in adapter.items() if ".lora_B." in key)  # rule frozen trains B alone
    assert estimate(recipe, shape, "cpu").trained == trained


def _shape(recipe: Recipe) -> ModelShape:
    config = read_config(recipe.model.model_name_or_path)
    stored = stored_quantization(config)
    shape = shape_of(config) if is_known(config) else shape_of_parameters(*parameter_shapes(config))
    return leaving_out(shape, (stored and stored.skipped) or ())


def _check_resumed(run: Path) -> None:
    """Resume after the first of two steps; the adapter is the same, bit for bit."""
    folder = RunFolder(run)
    before = load_file(folder.adapter / ADAPTER)
    manifest = json.loads(folder.manifest.read_text())
    folder.manifest.write_text(json.dumps(manifest | {"status": "interrupted"}))
    for path in sorted((run / "checkpoint-2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run / "checkpoint-2").rmdir()
    progress = Silent()
    run_training(TrainingRequest(recipe=folder.read_recipe(), resume=True), progress)
    assert "resuming from checkpoint-1" in progress.notes
    after = load_file(folder.adapter / ADAPTER)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _check_merged(model: Path, run: Path) -> None:
    """Merge, and compare logits with PEFT's adapter on the base in 4 bits, as plain transformers loads it."""
    found = run_merge(MergeRequest([run], [1.0], "dequantized", torch.float32), Silent())
    assert found.verification is not None and found.verification.failures == []
    config = AutoConfig.from_pretrained(model)
    merged = auto(config).from_pretrained(found.folder, dtype=torch.float32).eval()
    base = decoded(load_4bit(model, config))
    bare = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, RunFolder(run).adapter).eval())
    assert (logits(merged) - tuned).abs().max() <= ROUNDING * (bare - tuned).abs().max()


def load_4bit(folder: Path, config: Any) -> PreTrainedModel:
    """A base in 4 bits without this program: by its own quantization, or by QLoRA's."""
    held = {}
    if getattr(config, "quantization_config", None) is None:
        held["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = auto(config).from_pretrained(folder, dtype=torch.float32, **held)
    for layer in (one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)):
        layer.support_avx512bf16_for_cpu = False  # it would round to bfloat16
    return model.eval()


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """A base in 4 bits as training decodes it, which without gradients bitsandbytes rounds otherwise."""
    return model.dequantize(dtype=torch.float32).float()


def auto(config: Any) -> Any:
    """As published: for text where transformers has a class for that."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def logits(model: Callable[..., Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits
