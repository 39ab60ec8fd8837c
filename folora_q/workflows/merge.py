"""Merge adapters into their base, and verify the result. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer

from folora_q import __version__
from folora_q.errors import RunError, UserError
from folora_q.export.card import write_merged_card
from folora_q.export.ends import FittedCheckpoint, fitted
from folora_q.export.hub import push_folder, require_token
from folora_q.export.merge import BaseWeights, Merge, write_merged
from folora_q.export.texts import check_texts
from folora_q.export.verify import MergedModel, Verification, check_outputs, check_weights
from folora_q.models.adapter_file import AdapterFile, read_adapter
from folora_q.models.classes import auto_class
from folora_q.models.load import require_loadable
from folora_q.models.quantization import Quantization
from folora_q.models.trust import CODE_FLAG, NOTHING, Trust, names_code
from folora_q.models.weight_files import Checkpoint, model_folder, open_checkpoint
from folora_q.progress import Progress, StageTimer
from folora_q.recipe.schema import ModelSection
from folora_q.targets.find import adapter_folder, merged_folder
from folora_q.workflows.merge_gguf import GgufResult, export_gguf, find_tools
from folora_q.workflows.together import require_apart

# A file in a merged folder whose verification failed.
UNVERIFIED = "UNVERIFIED"
# Bytes per weight for comparing in float32: the weights, and the overhead of loading and computing.
FLOAT32_MEMORY = 5


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and how.

    Attributes:
        sources: run folders or adapter folders, of one base.
        shares: weight of each adapter.
        dtype: None is the base's own if it has 16 bits, else bfloat16.
        output: None is `merged` in the run folder, or a folder next to the adapter's.
        base_model: the base to use instead of the one that the adapter names.
        gguf: also write a GGUF file of this type, next to the output.
        converter: path of llama.cpp's converter, if it is not found.
        quantizer: path of llama-quantize, if it is not found.
        push_to_hub: the repository to push the merged model to.
        private: whether to create that repository as private.
        trust: what base and adapters may do.
    """

    sources: Sequence[Path]
    shares: Sequence[float]
    weights: BaseWeights
    dtype: torch.dtype | None = None
    output: Path | None = None
    base_model: str | None = None
    verify: bool = True
    overwrite: bool = False
    gguf: str | None = None
    converter: Path | None = None
    quantizer: Path | None = None
    push_to_hub: str | None = None
    private: bool = True
    trust: Trust = NOTHING


@dataclass(frozen=True)
class MergeResult:
    """What was written, and how it was verified.

    Attributes:
        verification: None if it was not asked for.
        gguf: the GGUF file, its content, and what it keeps of the tuning.
        url: the repository that the model was pushed to.
    """

    folder: Path
    merge: Merge
    verification: Verification | None
    gguf: GgufResult | None = None
    url: str | None = None

    @property
    def loader(self) -> str:
        """Name of the transformers class that loads the model."""
        return auto_class(
            AutoConfig.from_pretrained(self.folder, trust_remote_code=self.merge.trust.remote_code)
        ).__name__


def run_merge(request: MergeRequest, progress: Progress) -> MergeResult:
    """Merge adapters into their base, and verify the result.

    Raises:
        UserError: an adapter or its base cannot be merged, or the output already exists.
        RunError: the verification failed; the folder is kept and marked.
    """
    return MergeRun(request, StageTimer(progress)).run()


class MergeRun:
    """One merge in reading order: read the adapters, find the base, write, verify, convert, push."""

    def __init__(self, request: MergeRequest, timer: StageTimer) -> None:
        self.request, self.timer = request, timer
        self.target = request.output or merged_folder(request.sources[0])
        self.verification: Verification | None = None
        self.failures: list[str] = []

    def run(self) -> MergeResult:
        """Run all steps."""
        request, target = self.request, self.target
        tools = find_tools(request.gguf, request.converter, request.quantizer) if request.gguf else None
        if request.push_to_hub:
            require_token()
        adapters = [read_adapter(adapter_folder(source), request.trust) for source in request.sources]
        require_apart(request.sources, request.trust)
        if target.exists() and not request.overwrite:
            raise UserError(f"{target} already exists", "add --overwrite, or name another place with --output")
        for leftover in target.parent.glob(f".{target.name}.*"):
            self.timer.note(f"{leftover} is left from a merge that was killed; it is not used, and can be deleted")
        merge = self.prepare(adapters)
        self.write(merge)
        gguf = url = None
        if request.gguf and tools:
            compute = _compute_dtype(merge)[0] if request.verify else None
            gguf = export_gguf(MergedModel(merge, target), request.gguf, tools, compute, self.timer)
        if request.push_to_hub:
            with self.timer.stage(f"pushing to {request.push_to_hub}", None):
                url = push_folder(target, request.push_to_hub, request.private)
        return MergeResult(target, merge, self.verification, gguf, url)

    def prepare(self, adapters: Sequence[AdapterFile]) -> Merge:
        """Find the base, fit it to the adapters, and choose the dtype."""
        request = self.request
        base, adapters = fitted(_base(adapters, request, self.timer), adapters, request.trust)
        if isinstance(base, FittedCheckpoint):
            self.timer.note(base.note)
        folders = [base.folder, *(adapter.folder for adapter in adapters)]  # its tokenizer may be the adapter's
        if request.gguf and not request.trust.remote_code and (naming := next(filter(names_code, folders), None)):
            raise UserError(
                f"llama.cpp's converter runs Python that comes with a model, and what {naming} names is not trusted",
                f"read that code; if you trust it, add {CODE_FLAG}, or leave out --gguf",
            )
        dtype, reason = (request.dtype, "as asked") if request.dtype else _dtype_of(base)
        shared = list(zip(adapters, request.shares, strict=True))
        trained_on = _trained_on(adapters, request, self.timer)
        merge = Merge(base, shared, request.weights, dtype, _quantization(adapters), request.trust, trained_on)
        size = f"{merge.result_bytes / 1e9:.2f} GB in {_name(dtype)} ({reason})"
        self.timer.note(f"{len(merge.changed)} of {len(base.tensors)} weights change; {size}")
        return merge

    def write(self, merge: Merge) -> None:
        """Write the merged model, and verify it before it gets its name.

        Raises:
            RunError: the verification failed; the folder is marked.
        """
        with ExitStack() as writing:
            done = writing.enter_context(self.timer.stage("merging", merge.result_bytes, "bytes"))

            def finish(folder: Path) -> dict[str, Any]:
                writing.close()
                return self.report(merge, folder)

            write_merged(merge, self.target, finish, done)
        if self.failures:
            raise RunError(
                f"{'; '.join(self.failures)}; {self.target} is marked {UNVERIFIED}",
                "please report this with the adapter's configuration",
            )

    def report(self, merge: Merge, folder: Path) -> dict[str, Any]:
        """Verify the merged model, write its card and, on failure, the mark. Return the content of merge.json."""
        adapters, named = [adapter for adapter, _ in merge.adapters], self.request.base_model
        report: dict[str, Any] = {
            "folora_q": __version__,
            "base": adapters[0].base if named is None else named,
            "revision": adapters[0].revision,
            "base_weights": merge.weights,
            "dtype": _name(merge.dtype),
            "adapters": [{"name": _adapter_name(each.folder), "weight": share} for each, share in merge.adapters],
            "verified": None,
        }
        if self.request.verify:
            try:
                self.verification = _verify(merge, folder, self.timer)
                report |= self.verification.to_dict()
            except RunError as failure:
                report |= {"verified": False, "failures": [failure.message]}
            if not report["verified"]:
                (folder / UNVERIFIED).write_text("\n".join(report["failures"]) + "\n", encoding="utf-8")
        write_merged_card(folder / "README.md", report)
        self.failures = report.get("failures", [])
        return report


def _adapter_name(folder: Path) -> str:
    """Return the name of the run, or of the folder; the path to it stays private."""
    folder = folder.resolve()
    return folder.parent.name if (folder.parent / "run.json").exists() else folder.name


def _verify(merge: Merge, folder: Path, clock: StageTimer) -> Verification:
    merged_model = MergedModel(merge, folder)
    with clock.stage("checking every weight", merge.result_bytes, "bytes") as done:
        weights = check_weights(merged_model, done)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=merge.trust.remote_code)
    texts = check_texts(merge.adapters[0][0].folder, tokenizer)
    compute, reason = _compute_dtype(merge)
    with clock.stage(f"comparing what it says, in {_name(compute)} ({reason})", 3, "models") as done:
        verification = check_outputs(merged_model, texts.sequences, weights, compute, done)
    clock.note(f"compared on {verification.tokens:,} tokens: {texts.origin}")
    return verification


def _compute_dtype(merge: Merge) -> tuple[torch.dtype, str]:
    """Choose float32 if the model then fits into memory, else the dtype of the merged model, with the reason."""
    needed = FLOAT32_MEMORY * sum(stored.numel for stored in merge.base.tensors.values())
    free = psutil.virtual_memory().available
    if needed <= free:
        return torch.float32, f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
    return merge.dtype, f"float32 needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"


def _base(adapters: Sequence[AdapterFile], request: MergeRequest, clock: StageTimer) -> Checkpoint:
    others = {(adapter.base, adapter.revision) for adapter in adapters}
    if len(others) > 1 and request.base_model is None:
        raise UserError(f"the adapters have different bases: {', '.join(sorted(base for base, _ in others))}")
    name = request.base_model or adapters[0].base
    if not name:
        raise UserError(f"{adapters[0].folder} names no base model", "name it with --base-model")
    with clock.stage(f"finding the base {name}", None):
        folder = model_folder(name, None if request.base_model else adapters[0].revision, request.trust)
        require_loadable(ModelSection(model_name_or_path=str(folder)), request.trust)
        return open_checkpoint(folder, request.trust)


def _trained_on(adapters: Sequence[AdapterFile], request: MergeRequest, clock: StageTimer) -> Path | None:
    """Return the 4-bit checkpoint that an adapter was trained on, if it is merged into another base.

    Raises:
        UserError: the verification needs it, and it cannot be found.
    """
    found = next((each for each in adapters if each.quantization and each.quantization.prequantized), None)
    if found is None or request.base_model is None or not request.verify:
        return None
    if request.weights == "original":
        clock.note(
            f"{found.folder} was trained on {found.base}, in 4 bits; what is merged is compared with the adapter on "
            f"{request.base_model}"
        )
        return None
    try:
        return model_folder(found.base, found.revision, request.trust)
    except UserError as error:
        raise UserError(
            f"the merged model is to be compared with the one that was trained, on {found.base}: {error.message}",
            "leave --base-model out, or give --no-verify",
        ) from None


def _quantization(adapters: Sequence[AdapterFile]) -> Quantization:
    return next((adapter.quantization for adapter in adapters if adapter.quantization), Quantization())


def _dtype_of(base: Checkpoint) -> tuple[torch.dtype, str]:
    stored = {tensor.dtype for tensor in base.tensors.values()}
    if stored == {"F16"}:
        return torch.float16, "as the base is stored"
    return torch.bfloat16, "as the base is stored" if stored == {"BF16"} else "the usual"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
