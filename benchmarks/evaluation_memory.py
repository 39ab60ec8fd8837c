"""Memory that comparing base and tuned model takes beyond the model: ours, and with whole logits.

    .venv/bin/python benchmarks/evaluation_memory.py            two minutes on two CPU cores
    .venv/bin/python benchmarks/evaluation_memory.py --gpu      the same on a GPU

A Llama of 2 layers and 256 channels with vocabularies of 8k, 32k and 128k, on one batch of 2 texts of 256, 1024 and
2048 tokens. Each figure is the peak of a process of its own above what it held before; on a CPU the kernel tells it.
"Whole logits" is what one writes first: both models' logits of the batch, their losses and their KL.
"""

from __future__ import annotations

import subprocess
import sys

import click
from rich.table import Table

from folora_q.cli.console import err, out, quiet_libraries

quiet_libraries()  # before they are imported

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.data.tokens import batches
from folora_q.evaluation.divergence import HeldOutText, compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.hardware import PeakMemory

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
        raise click.ClickException("there is no GPU here")
    table = Table(title="peak memory beyond the model, MB", title_justify="left")
    for heading in ("vocabulary", "tokens a text", "ours", "whole logits", "ratio"):
        table.add_column(heading, justify="right")
    for vocabulary in VOCABULARIES:
        for length in LENGTHS:
            ours, whole = (_in_a_process(way, vocabulary, length, gpu) for way in ("ours", "whole"))
            table.add_row(f"{vocabulary:,}", f"{length:,}", f"{ours:,.0f}", f"{whole:,.0f}", f"{ours / whole:.3f}")
            err.print(f"{vocabulary} {length}: {ours:.0f} {whole:.0f}")
    out.print(table)


@main.command(hidden=True)
@click.argument("way", type=click.Choice(["ours", "whole"]))
@click.argument("vocabulary", type=int)
@click.argument("length", type=int)
@click.option("--gpu", is_flag=True)
def once(way: str, vocabulary: int, length: int, gpu: bool) -> None:
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
    model = get_peft_model(LlamaForCausalLM(config).to(device), LoraConfig(target_modules="all-linear"))
    ids = torch.randint(0, vocabulary, (TEXTS, length)).tolist()
    text = HeldOutText("random", "own", list(batches(ids, TEXTS, device)))
    measure = {"ours": lambda text: compare(ModelPair(model), text), "whole": lambda text: _whole_logits(model, text)}[
        way
    ]
    measure(HeldOutText("few", "own", list(batches([row[:16] for row in ids], TEXTS, device))))  # libraries warm up
    memory = PeakMemory(device)
    memory.reset()
    before = torch.cuda.memory_allocated() if gpu else psutil.Process().memory_info().rss
    measure(text)
    click.echo((memory.peak() - before) / 1e6)


def _whole_logits(model: torch.nn.Module, text: HeldOutText) -> tuple[float, float, float]:
    [batch] = text.batches
    wanted = batch.labels[:, 1:].reshape(-1)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        tuned = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        log_p, log_q = log_softmax(base, -1), log_softmax(tuned, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return float(cross_entropy(base, wanted)), float(cross_entropy(tuned, wanted)), float(kl)


def _in_a_process(way: str, vocabulary: int, length: int, gpu: bool) -> float:
    command = [sys.executable, __file__, "once", way, str(vocabulary), str(length), *(["--gpu"] if gpu else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr[-500:])
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
