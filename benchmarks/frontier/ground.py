"""What all runs on a task share: the 4-bit base, the task's tokens, sampled text, what is measured on, statistics."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from benchmarks.frontier.covariances import TREATMENTS, Covariance, Made, Positions, measure
from benchmarks.frontier.questions import Questions
from benchmarks.frontier.results import digest
from benchmarks.frontier.texts import real_texts
from folora_q.core import SpectralGate
from folora_q.data.prepare import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.tokens import Batch, batches
from folora_q.data.windows import crops
from folora_q.evaluation.evaluate import HeldOut, held_out
from folora_q.evaluation.task import make_scorer
from folora_q.models.adapters import AdapterPair, adapter_pairs, keep_in_float32
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.models.tokenizer import load_tokenizer
from folora_q.progress import Clock
from folora_q.proxy.cache import kept_or_sampled, read_samples, settings_of_text
from folora_q.recipe import Recipe
from folora_q.recipe.schema import GateSection
from folora_q.statistics.collect import build_gates
from folora_q.statistics.store import load_gates, save_gates
from folora_q.statistics.texts import penalty_text, public_windows

DATA = Path(__file__).parent / "data"
RANK, ALPHA = 16, 16
# Of each general text, so many batches are measured.
GENERAL_BATCHES = 1
# Shared by all runs: the calibration's choice of task rows, the crops of sampled text.
SEED = 0
# Sequences that statistics are taken of at a time.
BATCH_SIZE = 16
# What a gate's statistics depend on.
STATISTICS = {"covariance", "rank", "oversampling", "ridge", "utility_ridge", "second_pass", "refinements"}
# Of the penalty's text; before 2026-11-29 they were the text's own. Keeps those statistics and runs apart.
LABELS = "drawn"
# As a rank: exact covariances in place of sketches.
DENSE = 1_000_000


class Ground:
    """Loaded once a task. Sketched statistics are kept in the folder, for the next process.

    Attributes:
        base: the model that is tuned. On a CPU its 4-bit weights are held decoded: the same numbers, and faster.
        own: texts that the base wrote, as tokens; none of them is measured on.
        sources: where each began: "bos" or "chat".
        on: what is measured on.
        device_name: where it all runs, for the record.
    """

    def __init__(self, recipe: Recipe, folder: Path, clock: Clock) -> None:
        self.recipe, self.clock, self.kept = recipe, clock, folder / "gates"
        self.scorer = make_scorer(recipe.evaluation, allow_code=False)
        evaluation = recipe.evaluation.model_copy(update={"general_text": list(map(str, real_texts(folder / "texts")))})
        task = read_task(recipe, clock)
        self.tokenizer = load_tokenizer(recipe.model, chat_template(recipe))
        self.data: TaskTokens = tokenize_task(recipe, task, self.tokenizer, clock)
        hardware = choose_hardware(recipe.model.dtype)
        self.device_name = str(hardware.facts()["name"])
        loaded = load_model(recipe.model, hardware, self.tokenizer)
        self.base: PreTrainedModel = loaded.model
        if self.base.device.type == "cpu":
            decode(self.base)
        samples = read_samples(written(recipe), self.base.get_input_embeddings().weight.shape[0]) or kept_or_sampled(
            self.base, self.tokenizer, loaded.fingerprint, str(hardware.dtype), recipe.proxy, clock
        )
        ids = [sample.ids for sample in samples]
        self.own, held = ids[: recipe.proxy.num_samples], ids[recipe.proxy.num_samples :]
        self.sources = [sample.source for sample in samples]
        self.on: HeldOut = held_out(
            self.tokenizer,
            evaluation,
            self.base.device,
            own=held,
            own_seed=recipe.proxy.seed,
            data=self.data,
            max_length=recipe.training.max_length,
        )
        self.on.texts[:] = [
            replace(text, batches=text.batches[:GENERAL_BATCHES]) if text.kind == "general" else text
            for text in self.on.texts
        ]
        self.questions = Questions(self.tokenizer, recipe.evaluation.batch_size)
        self._sketches: dict[str, dict[str, SpectralGate]] = {}
        self._gates: dict[str, dict[str, SpectralGate]] = {}
        self._measured: dict[str, dict[str, Positions]] = {}

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """The training rows: tokens, and labels."""
        rows = self.data.train.sequences
        return rows["input_ids"][:], rows["labels"][:]

    def tuned(self, seed: int, sixteen_bit: bool = False, **lora: object) -> PeftModel:
        """The base with a new adapter in float32; on a copy of it in 16 bits where a method changes weights."""
        base = copy.deepcopy(self.base) if sixteen_bit else self.base
        if sixteen_bit:
            decode(base)
        set_seed(seed)
        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
        model = get_peft_model(base, LoraConfig(**settings))
        keep_in_float32(model)
        return model

    def shown(self, own: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Texts from their start, and then all of them cut, as the pipeline takes statistics of them."""
        return [*own, *crops(own, SEED + 1)]

    def gates(
        self,
        model: PeftModel,
        section: GateSection,
        proxy: Sequence[Sequence[int]] | None = None,
        key: str = "own",
        kind: type[SpectralGate] = SpectralGate,
        treatment: str = "plain",
        covariance: str | None = None,
        public: float = 0.0,
    ) -> dict[str, SpectralGate]:
        """The gates of a model's layers. Statistics are taken once for settings that share them.

        Args:
            section: its rank DENSE takes exact covariances in place of sketches.
            proxy, key: other proxy text than the usual, and a name for it.
            kind: the class of the gates.
            treatment: of exact covariances (benchmarks/frontier/covariances.py).
            covariance: of exact ones, in place of the section's; "rows" is the papers', prompts and all.
            public: the share of packaged public text in Σp.
        """
        covariance = covariance or section.covariance
        shape = section.model_dump(include={"floor", "sharpness", *STATISTICS})
        name = f"{key} {public} {kind.__name__} {treatment} {covariance} {sorted(shape.items())}"
        if name not in self._gates:
            found: Mapping[str, SpectralGate | tuple[Covariance, Covariance]]
            if section.rank < DENSE:
                found = self._sketched(model, section, proxy, key, public)
            else:
                self._gates.clear()  # exact ones take gigabytes
                found = self.exact_covariances(model, covariance, proxy, key, treatment, public)
            # The problem of an exact covariance takes seconds to solve, a strength nothing.
            shaped = {"gate_lambda": 0.0, "floor": section.floor, "sharpness": section.sharpness}
            gates: dict[str, SpectralGate] = {}
            last = None
            for layer, of in found.items():
                if of is not last:
                    state = of.state_dict() if isinstance(of, SpectralGate) else _exact(*of, section, covariance)
                    last, gate = of, kind.from_state_dict(state | shaped).to(self.base.device)
                gates[layer] = gate
            self._gates[name] = gates
        strong = {id(gate): gate.with_lambda(section.gate_lambda) for gate in self._gates[name].values()}
        return {layer: strong[id(gate)] for layer, gate in self._gates[name].items()}

    def covariances(self, model: PeftModel) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Σp and Σt of every layer's input, exact (d, d) in float64, each divided by its own mean variance.

        As the papers have them: all tokens of whole rows count alike.
        """
        penalty, utility = self._positions(model, "rows")
        return Made(penalty, utility, lambda *both: tuple(each.normalized for each in TREATMENTS["plain"](*both)))

    def forget(self) -> None:
        """Let go of all statistics."""
        for kept in (self._sketches, self._gates, self._measured):
            kept.clear()

    def exact_covariances(
        self,
        model: PeftModel,
        covariance: str,
        proxy: Sequence[Sequence[int]] | None = None,
        key: str = "own",
        treatment: str = "plain",
        public: float = 0.0,
    ) -> Mapping[str, tuple[Covariance, Covariance]]:
        """By the recipe's `gate.covariance`; or of whole "rows", in which prompts count too."""
        return Made(*self._positions(model, covariance, proxy, key, public), TREATMENTS[treatment])

    def _positions(
        self,
        model: PeftModel,
        covariance: str,
        proxy: Sequence[Sequence[int]] | None = None,
        key: str = "own",
        public: float = 0.0,
    ) -> list[dict[str, Positions]]:
        """Of the proxy text and of the task's, read once."""
        sides = []
        texts = self._texts(proxy, covariance == "rows", public)
        for name, text in zip((f"{key} {public}", "task"), texts, strict=True):
            name = f"{name} {covariance}"
            if name not in self._measured:
                self._measured[name] = measure(model, text, weighted=covariance == "fisher")
            sides.append(self._measured[name])
        return sides

    def _sketched(
        self, model: PeftModel, section: GateSection, proxy: Sequence[Sequence[int]] | None, key: str, public: float
    ) -> dict[str, SpectralGate]:
        name = f"{key} {public} {LABELS} {sorted(section.model_dump(include=STATISTICS).items())}"
        if name not in self._sketches:
            texts = self._texts(proxy, False, public)
            tokens = [[batch.input_ids.tolist(), batch.labels.tolist()] for text in texts for batch in text]
            path = self.kept / f"{digest([self.recipe.model.model_dump(mode='json'), name, tokens])}.safetensors"
            if path.exists():
                self._sketches[name] = load_gates(path, self.base.device)
            else:
                self._sketches[name] = build_gates(model, adapter_pairs(model), *texts, section, self.clock)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_gates(path, self._sketches[name])
        return self._sketches[name]

    def _texts(
        self, proxy: Sequence[Sequence[int]] | None, rows: bool, public: float = 0.0
    ) -> tuple[list[Batch], list[Batch]]:
        """Proxy text and the task's, as statistics are taken of them."""
        ids, labels = self.rows()
        chosen = random.Random(SEED).sample(range(len(ids)), min(self.recipe.gate.num_task_samples, len(ids)))
        sequences, learned = [ids[i] for i in chosen], None if rows else [labels[i] for i in chosen]
        proxy = self.shown(self.own) if proxy is None else proxy
        device = self.base.device
        others = list(batches(public_windows(self.tokenizer), BATCH_SIZE, device))
        written = penalty_text(list(batches(proxy, BATCH_SIZE, device)), others, public)
        return written, list(batches(sequences, BATCH_SIZE, device, learned))


def _exact(penalty: Covariance, utility: Covariance, section: GateSection, covariance: str) -> dict[str, Any]:
    """The state of a gate whose basis is the whole space; nothing lies outside, so its tails are not used."""
    unit = penalty.unit if covariance == "fisher" else utility.unit
    return {
        "basis": torch.eye(len(penalty.matrix)),
        "penalty_gram": penalty.normalized,
        "utility_gram": utility.matrix / unit,
        "penalty_tail": 1.0,
        "utility_tail": 1.0,
        "ridge": section.ridge,
        "utility_ridge": section.utility_ridge * utility.unit / unit,
    }


def written(recipe: Recipe) -> Path:
    """Where a model's own text lies beside the tasks: other processors sample other text, and runs are compared."""
    return DATA / f"own-{digest([recipe.model.model_name_or_path, settings_of_text(recipe.proxy)])}.jsonl"


def decode(model: nn.Module) -> None:
    """Put every 4-bit layer's decoded weights in its place: the same function to the last bit, but they can change."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.to(module.compute_dtype), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def pairs_with(gates: dict[str, SpectralGate], pairs: Sequence[AdapterPair]) -> list[tuple]:
    """(A, B, gate) of every adapted layer, as the optimizers of folora_q.core take them."""
    return [(pair.a, pair.b, gates[pair.name]) for pair in pairs]
