"""The testbed that all runs on a task share: the 4-bit base, tokens, generated and held-out text, statistics."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from benchmarks.frontier.covariances import Covariances, measure
from benchmarks.frontier.questions import Questions
from benchmarks.frontier.results import digest, model_name
from folora_q.calibration.collect import StatisticsSettings, build_gates
from folora_q.calibration.gate_store import load_gates, save_gates
from folora_q.calibration.sample_cache import SampledModel, load_or_sample, read_samples, settings_of_text
from folora_q.calibration.texts import penalty_text, public_windows
from folora_q.core import SpectralGate
from folora_q.data.batch_splitting import first_rows
from folora_q.data.task_data import TaskTokens, chat_template, read_task, tokenize_task
from folora_q.data.tokens import Batch, batches
from folora_q.data.windows import crops
from folora_q.evaluation.evaluate import HeldOut, HeldOutSources, held_out
from folora_q.evaluation.task import make_scorer
from folora_q.models.adapters import AdapterPair, keep_in_float32
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.models.parts import embedding_rows
from folora_q.models.tokenizer import load_tokenizer
from folora_q.progress import StageTimer
from folora_q.recipe import Recipe
from folora_q.recipe.gate import GateSection

DATA = Path(__file__).parent / "data"
RANK, ALPHA = 16, 16
TARGET_MODULES, TASK_TYPE = "all-linear", "CAUSAL_LM"
# The number of rows of each text that is measured: the task's held-out rows, and windows of each general text.
MEASURED_ROWS = {"task": 48, "general": 12}
# The same for all runs: the choice of task rows for statistics, the crops of generated text.
SEED = 0
# The number of sequences per batch when statistics are collected.
BATCH_SIZE = 16
# The settings that a gate's statistics depend on.
STATISTICS = {"covariance", "rank", "oversampling", "ridge", "utility_ridge", "second_pass", "refinements"}


class Testbed:
    """The base model, the data and the statistics of a task, loaded once for all of its runs.

    Sketched statistics are saved in the folder, for the next process.

    Attributes:
        base: the model that is tuned. On a CPU its 4-bit weights are held decoded: the same numbers, and faster.
        generated: texts that the base generated, as tokens; none of them is measured on.
        heldout: the texts that are measured on.
        device_name: the device that everything runs on, for the record.
    """

    def __init__(self, recipe: Recipe, folder: Path, clock: StageTimer) -> None:
        self.recipe, self.clock, self.kept = recipe, clock, folder / "gates"
        self.scorer = make_scorer(recipe.evaluation, allow_code=False)
        evaluation = recipe.evaluation.model_copy(update={"general_text": None})  # the packaged texts
        task = read_task(recipe, clock)
        self.tokenizer = load_tokenizer(recipe.model, chat_template(recipe))
        self.data: TaskTokens = tokenize_task(recipe, task, self.tokenizer, clock)
        hardware = choose_hardware(recipe.model.dtype)
        self.device_name = str(hardware.facts()["name"])
        loaded = load_model(recipe.model, hardware, self.tokenizer)
        self.base: PreTrainedModel = loaded.model
        samples = read_samples(generated_text_path(recipe), embedding_rows(self.base)) or load_or_sample(
            SampledModel(self.base, self.tokenizer, loaded.fingerprint, hardware.dtype), recipe.proxy, clock
        )
        ids = [sample.ids for sample in samples]
        self.generated, held = ids[: recipe.proxy.num_samples], ids[recipe.proxy.num_samples :]
        sources = HeldOutSources(held, recipe.proxy.seed, self.data)
        self.heldout: HeldOut = held_out(
            self.tokenizer, evaluation, self.base.device, sources, recipe.training.max_length
        )
        self.heldout.texts[:] = [
            replace(text, batches=first_rows(text.batches, MEASURED_ROWS[text.kind]))
            if text.kind in MEASURED_ROWS
            else text
            for text in self.heldout.texts
        ]
        self.questions = Questions(self.tokenizer, recipe.evaluation.batch_size)
        self._sketches: dict[str, dict[str, SpectralGate]] = {}
        self._covariances: Covariances | None = None

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens and the labels of the training rows."""
        rows = self.data.train.sequences
        return rows["input_ids"][:], rows["labels"][:]

    def tuned(self, seed: int, sixteen_bit: bool = False, **lora: Any) -> PeftModel:
        """Return the base with a new LoRA adapter in float32.

        Args:
            sixteen_bit: use a copy of the base in 16 bits, for methods that change its weights.
            lora: settings of `peft.LoraConfig`.
        """
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGET_MODULES}
        return self.adapted(seed, LoraConfig(task_type=TASK_TYPE, **settings | lora), sixteen_bit)

    def adapted(self, seed: int, config: PeftConfig, sixteen_bit: bool = False) -> PeftModel:
        """Return the base with a new adapter of any kind."""
        base = copy.deepcopy(self.base) if sixteen_bit else self.base
        if sixteen_bit:
            decode(base)
        set_seed(seed)
        model = get_peft_model(base, config)
        keep_in_float32(model)
        return model

    def gates(
        self, model: PeftModel, section: GateSection, kind: type[SpectralGate] = SpectralGate
    ) -> dict[str, SpectralGate]:
        """Return the gates of a model's layers, as in `folora-q train`.

        Statistics are collected once for all settings that share them.

        Args:
            kind: the class of the gates.
        """
        shape = {"gate_lambda": section.gate_lambda, "floor": section.floor, "sharpness": section.sharpness}
        gates: dict[int, SpectralGate] = {}
        found = self._sketched(model, section)
        for gate in found.values():
            if id(gate) not in gates:
                gates[id(gate)] = kind.from_state_dict(gate.state_dict() | shape).to(self.base.device)
        return {layer: gates[id(gate)] for layer, gate in found.items()}

    def covariances(self, model: PeftModel) -> Covariances:
        """Return Σp and Σt of every layer's input as in the papers: all tokens have the same weight.

        Σp is of model-generated text only.
        """
        if self._covariances is None:
            generated = list(batches(self.with_crops(self.generated), BATCH_SIZE, self.base.device))
            ids, _ = self._task_rows()
            task = list(batches(ids, BATCH_SIZE, self.base.device))
            self._covariances = Covariances(measure(model, generated), measure(model, task))
        return self._covariances

    def clear_statistics(self) -> None:
        """Free the memory of all statistics."""
        self._sketches.clear()
        self._covariances = None

    def with_crops(self, texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return the texts and then a crop of each, as statistics are collected of them in `folora-q train`."""
        return [*texts, *crops(texts, SEED + 1)]

    def _sketched(self, model: PeftModel, section: GateSection) -> dict[str, SpectralGate]:
        share = self.recipe.proxy.public_share
        name = f"{share} {sorted(section.model_dump(include=STATISTICS).items())}"
        if name not in self._sketches:
            texts = self._texts(share)
            tokens = [[batch.input_ids.tolist(), batch.labels.tolist()] for text in texts for batch in text]
            loaded_as = self.recipe.model.model_dump(mode="json", exclude={"model_name_or_path"})
            path = self.kept / f"{digest([model_name(self.recipe), loaded_as, name, tokens])}.safetensors"
            if path.exists():
                self._sketches[name] = load_gates(path, self.base.device)
            else:
                self._sketches[name] = build_gates(model, *texts, StatisticsSettings(section), self.clock)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_gates(path, self._sketches[name])
        return self._sketches[name]

    def _texts(self, public_share: float) -> tuple[list[Batch], list[Batch]]:
        """Return the batches of the penalty's text and of the task's, as in `folora-q train`."""
        device = self.base.device
        generated = list(batches(self.with_crops(self.generated), BATCH_SIZE, device))
        public = list(batches(public_windows(self.tokenizer), BATCH_SIZE, device))
        ids, labels = self._task_rows()
        penalty = penalty_text([(generated, 1 - public_share), (public, public_share)])
        return penalty, list(batches(ids, BATCH_SIZE, device, labels))

    def _task_rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens and the labels of the training rows that statistics are collected of."""
        ids, labels = self.rows()
        chosen = random.Random(SEED).sample(range(len(ids)), min(self.recipe.gate.num_task_samples, len(ids)))
        return [ids[i] for i in chosen], [labels[i] for i in chosen]


def generated_text_path(recipe: Recipe) -> Path:
    """Return where the repository stores a model's generated text: sampling differs between processors."""
    name = model_name(recipe)
    return DATA / f"own-{Path(name).stem}-{digest([name, settings_of_text(recipe.proxy)])}.jsonl"


def decode(model: nn.Module) -> None:
    """Replace every 4-bit layer by a linear layer with its decoded weights: the same function, bit for bit."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            packed: Any = module.weight  # bitsandbytes declares a plain tensor
            weight = dequantize_4bit(packed.data, packed.quant_state)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight.to(module.compute_dtype), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def pairs_with(
    gates: Mapping[str, SpectralGate], pairs: Sequence[AdapterPair]
) -> list[tuple[nn.Parameter, nn.Parameter, SpectralGate]]:
    """Return (A, B, gate) of every adapted layer, as the optimizers of folora_q.core take them."""
    return [(pair.a, pair.b, gates[pair.name]) for pair in pairs]
