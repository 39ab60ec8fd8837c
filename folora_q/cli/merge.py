"""`folora-q merge`: merge an adapter into its base, and verify the result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.markup import escape
from rich.table import Table

from folora_q.cli.console import out, print_table, starting
from folora_q.cli.options import trust_options
from folora_q.distributed.launch import require_one_process
from folora_q.errors import UserError
from folora_q.export.gguf_types import GGUF_TYPES
from folora_q.models.trust import Trust
from folora_q.targets.find import adapter_folder, merged_folder

if TYPE_CHECKING:
    from folora_q.export.merge import BaseWeights
    from folora_q.workflows.merge import MergeResult
    from folora_q.workflows.merge_gguf import GgufResult

# Share of the adapter's effect on logits that rounding may have without a note.
NOTED_NOISE = 0.25


@click.command("merge")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), help="Run or adapter folders.")
@click.option(
    "--base",
    "weights",
    default="dequantized",
    show_default=True,
    type=click.Choice(["dequantized", "original"]),
    help="Base weights to merge into: those that were trained on (4 bits, dequantized), or the original 16-bit ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Dtype of the merged model. Default: the base's.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Output folder. Default: RUN/merged.")
@click.option("--base-model", help="Path or hub id of the base, if not the one that the adapter names.")
@click.option(
    "--weight", "shares", multiple=True, type=float, help="Weight of an adapter, once per adapter. Default: 1."
)
@click.option("--verify/--no-verify", default=True, help="Compare the merged model with the adapter. Default: on.")
@click.option(
    "--gguf",
    type=click.Choice(GGUF_TYPES),
    help="Also write a GGUF file of this type, and Ollama's Modelfile. Types with k need llama-quantize.",
)
@click.option(
    "--converter",
    type=click.Path(path_type=Path),
    help="Path of llama.cpp's convert_hf_to_gguf.py, if it is not found.",
)
@click.option(
    "--llama-quantize", "quantizer", type=click.Path(path_type=Path), help="Path of llama-quantize, if it is not found."
)
@click.option("--push-to-hub", metavar="REPO", help="Push the merged model to this repository, in one commit.")
@click.option("--public", is_flag=True, help="Make a new repository public. Default: private.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@trust_options
@click.pass_obj
def command(
    settings: dict[str, bool],
    sources: tuple[Path, ...],
    weights: BaseWeights,
    dtype: str | None,
    output: Path | None,
    base_model: str | None,
    shares: tuple[float, ...],
    verify: bool,
    gguf: str | None,
    converter: Path | None,
    quantizer: Path | None,
    push_to_hub: str | None,
    public: bool,
    overwrite: bool,
    trust: Trust,
) -> None:
    """Merge the adapter of a run, or any LoRA adapter, into its base, and verify the result.

    Several SOURCES of one base are added with their --weight. Needs no GPU, and memory for two shards; the verification
    needs memory for the model.
    """
    if shares and len(shares) != len(sources):
        raise UserError(
            f"{len(sources)} adapters and {len(shares)} weights", "give --weight once for each adapter, or not at all"
        )
    for source in sources:
        adapter_folder(source)  # what needs a few JSON files only is found before PyTorch is imported
    target = output or merged_folder(sources[0])
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists", "add --overwrite, or name another place with --output")
    require_one_process("merge")
    with starting(settings["debug"]) as progress:
        import torch

        from folora_q.workflows.merge import MergeRequest, run_merge
    request = MergeRequest(
        sources=sources,
        shares=shares or (1.0,) * len(sources),
        weights=weights,
        dtype=getattr(torch, dtype) if dtype else None,
        output=output,
        base_model=base_model,
        verify=verify,
        overwrite=overwrite,
        gguf=gguf,
        converter=converter,
        quantizer=quantizer,
        push_to_hub=push_to_hub,
        private=not public,
        trust=trust,
    )
    _print_result(run_merge(request, progress))


def _print_result(result: MergeResult) -> None:
    found = result.verification
    if found is None:
        out.print("[yellow]not verified[/] (--no-verify)")
    else:
        table = Table(title=f"Is it the adapter? Yes, on {found.tokens:,} tokens", title_justify="left")
        table.add_column("against the adapter on its base")
        table.add_column("merged", justify="right")
        table.add_column("bare base", justify="right")
        merged, base = found.merged, found.base_difference
        table.add_row("largest logit difference", f"{merged.largest:.3g}", f"{base.largest:.3g}")
        table.add_row("mean logit difference", f"{merged.mean:.3g}", f"{base.mean:.3g}")
        table.add_row("KL, nats per token", f"{merged.kl:.2g}", f"{base.kl:.2g}")
        table.add_row("same most likely token", f"{merged.agreement:.1%}", f"{base.agreement:.1%}")
        print_table(table)
        noise = "" if found.rounding is None else f", and its noise explains {found.rounding:.3g} of the mean"
        explained = f"; rounding keeps {found.kept:.1%} of the update{noise}"
        out.print(
            f"{found.weights} weights changed, each to the nearest number of its dtype{explained}", soft_wrap=True
        )
        if found.rounding is not None and found.noise_share > NOTED_NOISE:
            share = f"rounding moves logits {found.noise_share:.0%} as far as the adapter does"
            out.print(f"[yellow]note[/] {share}; --dtype float32 merges without it", soft_wrap=True)
    if result.gguf is not None and result.gguf.quality is not None:
        out.print(result.gguf.quality.in_words(result.gguf.kind), soft_wrap=True)
    out.print(f"\n[bold]Next[/]  (the model is in [cyan]{escape(str(result.folder))}[/])", soft_wrap=True)
    if result.gguf is not None:
        _print_gguf(result.gguf)
    if result.url is not None:
        out.print(f"  [dim]# pushed in one commit[/]\n  [cyan]{escape(result.url)}[/]", soft_wrap=True)
    chat = f"folora-q chat {shlex.quote(str(result.folder))}"
    out.print(f"  [dim]# talk to it[/]\n  [cyan]{escape(chat)}[/]", soft_wrap=True)
    loading = f"{result.loader}.from_pretrained({str(result.folder)!r})"
    out.print(f"  [dim]# any program that reads Hugging Face folders[/]\n  [cyan]{escape(loading)}[/]", soft_wrap=True)


def _print_gguf(result: GgufResult) -> None:
    """Print how to run a GGUF file."""
    facts = result.facts
    checked = "its numbers are the model's" if facts.compared else "names, shapes and vocabulary checked, not numbers"
    modelfile = result.modelfile
    template = "with the chat template" if modelfile.template else "without a template; see the comment in it"
    steps = [
        (f"{facts.tensors} tensors; {checked}", f"llama-cli -m {shlex.quote(str(result.path))}"),
        (f"Ollama, {template}", f"ollama create my-model -f {shlex.quote(str(modelfile.path))}"),
    ]
    for purpose, line in steps:
        out.print(f"  [dim]# {escape(purpose)}[/]\n  [cyan]{escape(line)}[/]", soft_wrap=True)
