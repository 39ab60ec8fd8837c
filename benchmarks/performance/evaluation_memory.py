"""Measure the memory that comparing the base with the tuned model needs: in chunks, and with all logits at once.

    .venv/bin/python -m benchmarks.performance.evaluation_memory            two minutes on two CPU cores
    .venv/bin/python -m benchmarks.performance.evaluation_memory --gpu      the same on a GPU

A Llama of 2 layers and 256 channels with vocabularies of 8k, 32k and 128k, on one batch of 2 texts of 256, 1024 and
2048 tokens. Each figure is the peak of a fresh process, minus what it held before the comparison; on a CPU the kernel
reports the peak. "Whole logits" is the obvious implementation: both models' logits of the batch, their losses and KL.
"""

from __future__ import annotations

import json
from typing import cast

import click
from rich.table import Table

from folora_q.cli.console import err, out, quiet_libraries

quiet_libraries()  # before they are imported

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.performance._process import in_a_process
from folora_q.data.tokens import batches
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.hardware import PeakMemory
from folora_q.runs.results import TextKind

VOCABULARIES = (8_000, 32_000, 128_000)
LENGTHS = (256, 1024, 2048)
TEXTS = 2


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--gpu", is_flag=True)
@click.pass_context
def main(context: click.Context, gpu: bool) -> None:
    if context.invoked_subcommand is not None:
        return
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("no GPU is available")
    table = Table(title="peak memory beyond the model, MB", title_justify="left")
    for heading in ("vocabulary", "tokens per text", "ours", "whole logits", "ratio"):
        table.add_column(heading, justify="right")
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            ours, whole = (_measure(way, vocabulary, length, gpu) for way in ("ours", "whole"))
            table.add_row(f"{vocabulary:,}", f"{length:,}", f"{ours:,.0f}", f"{whole:,.0f}", f"{ours / whole:.3f}")
            err.print(f"{vocabulary} {length}: {ours:.0f} {whole:.0f}")
    out.print(table)


@main.command(hidden=True)
@click.argument("way", type=click.Choice(["ours", "whole"]))
@click.argument("vocabulary", type=int)
@click.argument("length", type=int)
@click.option("--gpu", is_flag=True)
def once(way: str, vocabulary: int, length: int, gpu: bool) -> None:
    """Compare once in this process, and print the megabytes that it needed."""
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max(LENGTHS),
    )
    base = LlamaForCausalLM(config)
    cast(nn.Module, base).to(device)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    ids = torch.randint(0, vocabulary, (TEXTS, length)).tolist()
    text = HeldOutText("random", TextKind.GENERATED, list(batches(ids, TEXTS, device)))

    def measure(text: HeldOutText) -> None:
        compare(ModelPair(model), text) if way == "ours" else _whole_logits(model, text)

    measure(
        HeldOutText("few", TextKind.GENERATED, list(batches([row[:16] for row in ids], TEXTS, device)))
    )  # libraries warm up
    memory = PeakMemory(device)
    memory.reset()
    before = torch.cuda.memory_allocated() if gpu else psutil.Process().memory_info().rss
    measure(text)
    peak = memory.peak()
    if peak is None:
        raise click.ClickException("this system does not report a process's peak memory")
    click.echo(json.dumps((peak - before) / 1e6))


def _whole_logits(model: PeftModel, text: HeldOutText) -> tuple[float, float, float]:
    [batch] = text.batches
    wanted = batch.labels[:, 1:].reshape(-1)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        tuned = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        log_p, log_q = log_softmax(base, -1), log_softmax(tuned, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return float(cross_entropy(base, wanted)), float(cross_entropy(tuned, wanted)), float(kl)


def _measure(way: str, vocabulary: int, length: int, gpu: bool) -> float:
    device = ["--gpu"] if gpu else []
    return in_a_process("benchmarks.performance.evaluation_memory", "once", way, vocabulary, length, *device)


if __name__ == "__main__":
    main()
