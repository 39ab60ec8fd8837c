"""Measure merging: its time and memory compared with PEFT's, and the loss of models merged into either base.

    .venv/bin/python -m benchmarks.performance.export cost               wall time and peak memory at three model sizes
    .venv/bin/python -m benchmarks.performance.export bases runs/demo    original or dequantized weights: a finished
                                                       run, and a Qwen2 that is trained and tuned for this (15 minutes)

`cost` runs each way three times, in turn, each in a fresh process. Memory is the process's peak, which includes the
pages of mapped files. PEFT's way is from_pretrained, merge_and_unload and save_pretrained on 16-bit weights.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import click
from rich.table import Table

from folora_q.cli.console import ConsoleProgress, err, out, quiet_libraries, quiet_progress_bars

quiet_libraries()  # before they are imported

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.performance._process import time_and_peak
from folora_q.data.loading import read_task_data
from folora_q.data.task_data import chat_template, tokenize_task
from folora_q.data.tokens import batches
from folora_q.evaluation.loss import GENERAL_TEXTS, mean_loss, text_windows
from folora_q.export.texts import check_texts
from folora_q.export.verify import Difference, compare_logits, logits_of
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.models.parts import base_of, embedding_rows
from folora_q.models.tokenizer import load_tokenizer
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.shipped import recipes_folder
from folora_q.runs.folder import RunFolder
from folora_q.workflows.merge import MergeRequest, adapter_folder, run_merge
from folora_q.workflows.train import TrainingRequest, run_training

# Layers of a Llama with 1,024 channels and a vocabulary of 32,000: 0.25, 0.76 and 1.5 GB in bfloat16.
LAYERS = (4, 20, 44)
SHARD = "150MB"
# For training the small Qwen2 from scratch.
EPOCHS = 120
PEFT_WAY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="150MB")
"""
IMPORTS = "import torch, peft, transformers, folora_q.workflows.merge"


@click.group()
def main() -> None:
    """Measure merging."""


@main.command()
@click.option("--runs", default=3, show_default=True, type=click.IntRange(min=1))
def cost(runs: int) -> None:
    """Measure wall time and peak memory, ours and PEFT's, at three sizes."""
    table = Table(title=f"medians of {runs} runs; shards of {SHARD}", title_justify="left")
    for heading in ("model", "ours: s", "PEFT: s", "ratio", "ours: peak MB", "PEFT: peak MB", "ratio"):
        table.add_column(heading, justify="right")
    idle = time_and_peak([sys.executable, "-c", IMPORTS])[1]
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as scratch:
            base, adapter = _random_model(Path(scratch), layers)
            size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
            ours = [sys.executable, "-m", "folora_q", "merge", str(adapter), "--base", "original", "--no-verify"]
            ours += ["--overwrite", "--output", f"{scratch}/ours"]
            theirs = [sys.executable, "-c", textwrap.dedent(PEFT_WAY), str(base), str(adapter), f"{scratch}/peft"]
            found = [(time_and_peak(ours), time_and_peak(theirs)) for _ in range(runs)]
            err.print(f"{size:.2f} GB: {found}")
        (our_time, our_peak), (peft_time, peft_peak) = (
            [statistics.median(pair[way][what] for pair in found) for what in (0, 1)] for way in (0, 1)
        )
        table.add_row(
            f"{size:.2f} GB",
            f"{our_time:.1f}",
            f"{peft_time:.1f}",
            f"{our_time / peft_time:.2f}",
            f"{our_peak:,.0f}",
            f"{peft_peak:,.0f}",
            f"{our_peak / peft_peak:.2f}",
        )
    out.print(table)
    out.print(f"Each peak includes {idle:,.0f} MB of imported libraries.")


def _random_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """Save a base and an adapter with random weights, and return their folders."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    tuned.save_pretrained(str(folder / "adapter"))
    return folder / "base", folder / "adapter"


@dataclass(frozen=True)
class Row:
    """A model's losses on the run's held-out text in nats per token, and its difference from the model as trained."""

    name: str
    task: float
    general: float
    from_trained: Difference | None
    from_base: float


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--qwen/--no-qwen", default=True, help="Also train and tune a small Qwen2.")
def bases(runs: tuple[Path, ...], qwen: bool) -> None:
    """Merge finished RUNS into both kinds of base weights, and compare with the 4-bit model that was trained."""
    quiet_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        for run in runs:
            _print_rows(str(run), _compare(run, Path(scratch)))
        if qwen:
            _print_rows("a Qwen2 of 15M parameters", _compare(_tuned_qwen(Path(scratch)), Path(scratch)))


def _print_rows(name: str, rows: list[Row]) -> None:
    table = Table(title=name, title_justify="left")
    headings = ("model", "task loss", "general loss", "KL from trained", "same top token", "KL from the 4-bit base")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        apart = row.from_trained
        table.add_row(
            row.name,
            f"{row.task:.4f}",
            f"{row.general:.4f}",
            "" if apart is None else f"{apart.kl:.4f}",
            "" if apart is None else f"{apart.agreement:.1%}",
            f"{row.from_base:.4f}",
        )
    out.print(table)


def _compare(run: Path, scratch: Path) -> list[Row]:
    recipe = RunFolder(run).read_recipe()
    adapter = adapter_folder(run)
    tokenizer = load_tokenizer(recipe.model, chat_template(recipe))
    progress = ConsoleProgress()
    task = read_task_data(recipe.data, recipe.training.seed)
    heldout = tokenize_task(recipe, task, tokenizer, StageTimer(progress)).heldout.sequences
    texts = check_texts(adapter, tokenizer).sequences
    general = text_windows(GENERAL_TEXTS["prose"], tokenizer, 256)
    base = load_model(recipe.model, choose_hardware(recipe.model.dtype), tokenizer)
    vocabulary = embedding_rows(base.model)
    bare = logits_of(base.model, texts, vocabulary)
    tuned = PeftModel.from_pretrained(base.model, adapter).eval()
    trained = logits_of(tuned, texts, vocabulary)

    def row(name: str, model: PreTrainedModel, logits: torch.Tensor, apart: Difference | None) -> Row:
        device = next(model.parameters()).device
        on_task = batches(heldout["input_ids"][:], 16, device, heldout["labels"][:])
        losses = mean_loss(model, on_task), mean_loss(model, batches(general, 8, device))
        return Row(name, *losses, apart, compare_logits(bare, logits).kl)

    rows = [row("4-bit base with the adapter, as trained", base_of(tuned), trained, None)]
    for weights in ("dequantized", "original"):
        target = scratch / f"{run.name}-{weights}"
        run_merge(MergeRequest([run], [1.0], weights, torch.bfloat16, target), progress)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
        logits = logits_of(model, texts, vocabulary)
        rows.append(row(f"merged, --base {weights}", model, logits, compare_logits(trained, logits)))
    return rows


def _tuned_qwen(scratch: Path) -> Path:
    """Train a Qwen2 on the packaged prose, tune it by plain QLoRA, and return the run's folder.

    The prose contains no turns of a chat, so the base ends none.
    """
    demo = load_recipe(recipes_folder() / "demo.yaml")
    tokenizer = load_tokenizer(demo.model)
    bos = cast(int, tokenizer.bos_token_id)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=cast(int, tokenizer.eos_token_id),
    )
    model = Qwen2ForCausalLM(config)
    texts = text_windows(GENERAL_TEXTS["prose"], tokenizer, 128)
    texts = [[bos, *ids] for ids in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progress = ConsoleProgress()
    with progress.stage("training a Qwen2 from scratch", EPOCHS * -(-len(texts) // 16)) as done:
        for _ in range(EPOCHS):
            for batch in batches([texts[i] for i in torch.randperm(len(texts))], 16, torch.device("cpu")):
                loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                done(1)
    folder = scratch / "qwen"
    cast(nn.Module, model).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    changes = [f"model.model_name_or_path={folder}", f"training.output_dir={scratch / 'qwen-run'}", "proxy.source=bos"]
    changes += ["evaluation.metric=none", "gate.enabled=false", "training.learning_rate=1e-3"]
    recipe = load_recipe(recipes_folder() / "demo.yaml", changes)
    run_training(TrainingRequest(recipe=recipe), progress)
    return Path(recipe.training.output_dir)


if __name__ == "__main__":
    main()
