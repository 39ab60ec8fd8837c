"""What a run needs before there is an adapter: the base model, sampled text, and what is measured on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import SampledModel, load_or_sample, read_samples, write_samples
from folora_q.data.batch_splitting import first_rows
from folora_q.errors import UserError, first_line
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.evaluate import (
    HeldOut,
    HeldOutSources,
    held_out,
    whole_and_cut,
)
from folora_q.evaluation.kept import Kept
from folora_q.kernels.liger import apply_liger
from folora_q.memory.estimate import GIB, SHARDED
from folora_q.memory.micro_batches import of_all_processes, of_one_process
from folora_q.models.adapters import names_of_base
from folora_q.models.earlier_adapter import save_earlier
from folora_q.models.hardware import PeakMemory
from folora_q.models.load import LoadedModel, load_model, require_loadable, stop_at
from folora_q.models.logits import verify_chunked_logits
from folora_q.models.parts import embedding_rows
from folora_q.models.target_modules import in_16_bits, listed
from folora_q.progress import StageTimer
from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.runs.results import TextKind
from folora_q.storage.files import atomic_write
from folora_q.training.fault_tolerant_trainer import Monitored
from folora_q.workflows.calibration import CalibrationText
from folora_q.workflows.earlier_tasks import held_out_texts
from folora_q.workflows.keeping import BaseAnswers, from_samples, samples_of_all
from folora_q.workflows.prepare_training import PreparedRun
from folora_q.workflows.step_plan import plan_on
from folora_q.workflows.training_work import estimated_work


class RunInputs:
    """The base model of a run, and its texts.

    Args:
        prepared: everything that is known before the model is loaded.
        timer: times the stages, and passes notes on.
    """

    def __init__(self, prepared: PreparedRun, timer: StageTimer) -> None:
        self.prepared, self.timer = prepared, timer
        self.recipe, self.folder, self.data = prepared.recipe, prepared.folder, prepared.data
        self.hardware, self.manifest, self.resumed = prepared.hardware, prepared.manifest, prepared.resumed
        self.processes = prepared.processes
        timer.meter = PeakMemory(self.hardware.device)

    def write_inputs(self) -> None:
        """Write the recipe with all its defaults, and the rows that were left out."""
        if skipped := self.data.skipped():
            self.folder.write_lines(self.folder.skipped, skipped)
        atomic_write(self.folder.recipe, dump_yaml(self.prepared.request.recipe.model_dump(mode="json")))

    def plan_steps(self) -> None:
        """Choose by the GPU's memory how steps are computed and where the base is; a CPU follows the recipe.

        Raises:
            UserError: there is no such model, or it cannot be computed as the recipe says.
        """
        recipe, count, trust = self.recipe, self.processes.count, self.prepared.request.trust
        config = require_loadable(recipe.model, trust)
        try:
            plan = plan_on(self.hardware, of_one_process(recipe, count), config, self.processes)
        except UserError as error:
            self.timer.note(f"the batch is computed as the recipe says: {first_line(error.message)}")
            plan = None
        if plan is not None:
            self.recipe = of_all_processes(plan.recipe, count)
            who = "each step computes" if count == 1 else "in each step every GPU computes"
            self.timer.note(f"{who} {plan}; at most {plan.memory.peak / GIB:.1f} GiB by the estimate")
            self.timer.note(plan.calibration)
        if (place := self.recipe.model.fsdp) in SHARDED:
            if recipe.model.adapter is not None:
                raise UserError(
                    "this base is sharded (model.fsdp), and one with a model.adapter must be complete on each GPU",
                    "set model.fsdp: none, or merge the adapter (folora-q merge) and name the merged model",
                )
            if recipe.training.kernels == "compile":
                raise UserError(
                    "training.kernels: compile needs a complete base, and this one is sharded (model.fsdp)",
                    "set training.kernels: auto",
                )
            self.processes = replace(self.processes, sharded=True)
            self.timer.note(f"each process has a part of the base (model.fsdp: {place})")

    def load_base(self) -> LoadedModel:
        """Load the base model in 4 bits, and check that a resumed run started with the same one."""
        recipe, note = self.recipe, self.timer.note
        note(f"computing in {self.hardware}")
        if self.processes.count > 1:
            note(f"one of {self.processes.count} processes, which share the work")
        elif self.hardware.others is not None:
            note(self.hardware.others)
        with self.timer.stage("loading the model in 4 bits", None):
            trust = self.prepared.request.trust
            base = load_model(recipe.model, self.hardware, self.prepared.tokenizer, trust, self.processes)
        for data in (self.data, *(task.data for task in self.prepared.earlier)):
            for token in data.ends_of_turn:
                stop_at(base.model, token)
        first = torch.tensor([self.data.train.sequences[0]["input_ids"][:16]], device=base.model.device)
        if recipe.training.kernels == "liger":
            apply_liger(base.model, first)
        verify_chunked_logits(base.model, first)  # statistics, KL and losses all rest on it
        note(f"{base.quantized_modules} linear layers in 4 bits ({base.quantization})")
        note(f"in 16 bits: {listed(in_16_bits(base.model))} of the weights")
        if self.resumed is not None:
            self.manifest["files_sha256"] = self.resumed.require_model(base.fingerprint)
        self.manifest["model"] = {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
        if base.earlier is not None:
            note(f"the base carries {base.earlier.name}: this is the model that is compared with and preserved")
            self.manifest["model"] |= {"adapter": base.earlier.name, "adapter_fingerprint": base.earlier.fingerprint}
            if base.earlier.base not in ("", base.name, recipe.export.base_model_name_or_path):
                self.timer.warn(
                    f"{base.earlier.name} was trained on {base.earlier.base}: is {base.name} the same model?"
                )
            if self.processes.first and not self.folder.earlier.is_dir():
                save_earlier(base.earlier, self.folder.earlier, names_of_base(base, recipe.export))
        return base

    def sample(self, base: LoadedModel) -> CalibrationText:
        """Get the sampled text from the resumed run, from the cache, or from the model."""
        section, path = self.recipe.proxy, self.folder.proxy

        def kept() -> list[ProxySample] | None:
            if self.resumed is None or not self.resumed.keeps(path):
                return None
            return read_samples(path, embedding_rows(base.model))

        samples = self.processes.share(kept)
        if samples is None:
            sampled = SampledModel(base.model, base.tokenizer, base.fingerprint, self.hardware.dtype)
            work = estimated_work(self.recipe, self.data, self.hardware.device.type == "cuda", self.prepared.kept)
            self.timer.note(work.sentence(sampled.cached(section).exists()))
            samples = load_or_sample(sampled, section, self.timer, self.processes)
            write_samples(path, samples, base.tokenizer)
        self._remember(path)
        return CalibrationText(samples[: section.num_samples], samples[section.num_samples :])

    def keep(self, base: LoadedModel) -> list[Kept]:
        """Get the base's answers to the prompts to keep: from the resumed run, the cache, or the model."""
        sources, path = self.prepared.kept, self.folder.keep
        if not sources:
            return []

        def earlier() -> list[Kept] | None:
            if self.resumed is None or not self.resumed.keeps(path):
                return None
            return from_samples(sources, read_samples(path, embedding_rows(base.model)) or [])

        kept = self.processes.share(earlier)
        if kept is None:
            answering = SampledModel(base.model, base.tokenizer, base.fingerprint, self.hardware.dtype)
            size = self.recipe.evaluation.batch_size
            kept = BaseAnswers(answering, size, self.timer, self.processes).kept(sources)
            write_samples(path, samples_of_all(kept), base.tokenizer)
        self._remember(path)
        return kept

    def held_out(self, base: LoadedModel, text: CalibrationText, kept: list[Kept]) -> HeldOut:
        """Gather the texts for the evaluation after training."""
        recipe = self.recipe
        unseen = [sample.ids for sample in text.held_out[recipe.steering_texts :]]
        sources = HeldOutSources(unseen, recipe.proxy.seed, self.data, kept, recipe.training)
        on = held_out(
            self.prepared.tokenizer, recipe.evaluation, base.model.device, sources, recipe.training.max_length
        )
        earlier = held_out_texts(self.prepared.earlier, recipe.evaluation.batch_size, base.model.device)
        return replace(on, texts=[*on.texts, *earlier])

    def monitored(self, base: LoadedModel, text: CalibrationText, measured_on: HeldOut) -> Monitored:
        """Choose the texts to monitor in training: held-out samples, in full and cropped, and windows of real text."""
        recipe, section = self.recipe, self.recipe.evaluation
        often = section.num_proxy_samples

        def generated(first: int, end: int) -> HeldOutText | None:
            ids = [sample.ids for sample in text.held_out[first:end]]
            return whole_and_cut(ids, recipe.proxy.seed, section.batch_size, base.model.device) if ids else None

        general = [each for each in measured_on.texts if each.kind is TextKind.GENERAL]
        windows = math.ceil(often / max(len(general), 1))
        return Monitored(
            generated(0, often),
            generated(often, recipe.steering_texts),
            [replace(each, batches=first_rows(each.batches, windows)) for each in general],
        )

    def _remember(self, path: Path) -> None:
        """Record the checksum of a finished file of the run; others than the first process may not have it."""
        if self.processes.first:
            self.folder.remember(self.manifest, path)
