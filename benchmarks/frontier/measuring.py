"""Measure what a tuned model learned and forgot, compared with a base that is measured once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from benchmarks.frontier.human_eval import Problem, pass_rate
from benchmarks.frontier.testbed import Testbed
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.task import Generation, greedy_tokens
from folora_q.models.logits import chunks, head_logits, hidden_states
from folora_q.models.parts import base_of
from folora_q.runs.results import TextKind


@dataclass(frozen=True)
class Measured:
    """Losses and KL(base ‖ tuned) in nats per token, ‖ΔW‖ over all adapted layers, and shares of right answers.

    A share is None if it was not measured.
    """

    loss: dict[str, float]  # by text
    kl: dict[str, float]  # on text that the base generated
    update_norm: float
    exact: float | None = None
    accuracy: float | None = None
    human_eval: float | None = None  # pass@1


class Evaluator:
    """Measures models on the same texts, and keeps the base's last hidden states there: a few megabytes.

    Args:
        problems: HumanEval's problems, if each model should solve them.
    """

    def __init__(self, testbed: Testbed, problems: Sequence[Problem] = ()) -> None:
        self.testbed, self.problems = testbed, problems
        self.base_states = {text.name: _states(testbed.base, text) for text in testbed.heldout.texts}
        self.base = self.measure(testbed.base)

    def measure(self, model: PreTrainedModel | PeftModel, losses: Measured | None = None) -> Measured:
        """Measure everything of a model; the base itself has a KL and a ‖ΔW‖ of zero.

        Args:
            losses: the model's losses, if they are known.
        """
        testbed, inner = self.testbed, base_of(model)
        model.eval()
        measured = losses or self.losses(model)
        exact = None
        if testbed.scorer is not None:
            asked = [(q, q.reference) for q in testbed.heldout.questions if q.reference is not None]
            settings = testbed.recipe.evaluation
            generation = Generation(settings.max_new_tokens, settings.batch_size)
            answers = greedy_tokens(inner, testbed.tokenizer, [q.ids for q, _ in asked], generation)
            scores = [
                testbed.scorer(testbed.heldout.reader.read(question, ids), reference)
                for (question, reference), ids in zip(asked, answers, strict=True)
            ]
            exact = sum(scores) / len(asked)
        passed = None
        if self.problems:
            passed = pass_rate(inner, testbed.tokenizer, self.problems, testbed.recipe.evaluation.batch_size)
        return replace(measured, exact=exact, accuracy=testbed.questions.accuracy(inner), human_eval=passed)

    def losses(self, model: PreTrainedModel | PeftModel) -> Measured:
        """Measure losses, KL and ‖ΔW‖, which takes little time."""
        model.eval()
        losses, kls = {}, {}
        for text in self.testbed.heldout.texts:
            is_base = model is self.testbed.base
            states = self.base_states[text.name][1] if is_base else _states(base_of(model), text)[1]
            losses[text.name], kl = self._compared(base_of(model), text, states)
            if text.kind is TextKind.GENERATED:
                kls[text.name] = kl
        return Measured(losses, kls, update_norm(self.testbed, model) if isinstance(model, PeftModel) else 0.0)

    @torch.no_grad()
    def _compared(self, model: PreTrainedModel, text: HeldOutText, tuned: Tensor) -> tuple[float, float]:
        """Return the loss and, on text that the base generated, the KL from it."""
        wanted, base = self.base_states[text.name]
        loss = kl = 0.0
        for part in chunks(len(wanted)):
            log_q = log_softmax(head_logits(model, tuned[part], exact=True), -1)
            loss -= float(log_q.gather(-1, wanted[part, None]).sum())
            if text.kind is TextKind.GENERATED:
                log_p = log_softmax(head_logits(self.testbed.base, base[part], exact=True), -1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
        return loss / len(wanted), kl / len(wanted)


@torch.no_grad()
def _states(model: PreTrainedModel, text: HeldOutText) -> tuple[Tensor, Tensor]:
    """Return the labelled tokens of a text, (n,), and the hidden states that they are predicted from, (n, h)."""
    wanted, states = [], []
    for batch in text.batches:
        wanted.append(batch.targets)
        states.append(hidden_states(model, batch.input_ids, batch.attention_mask)[batch.loss_positions])
    return torch.cat(wanted), torch.cat(states)


@torch.no_grad()
def update_norm(testbed: Testbed, model: PeftModel) -> float:
    """Return ‖W' - W‖ over all adapted layers, with W' the tuned layer's effective weight and W the base's."""
    total = 0.0
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer | OFTLayer):
            continue
        layer: Any = module  # the layers' subclasses have `get_delta_weight`
        untouched = testbed.base.get_submodule(name)
        before = dequantize_module_weight(getattr(untouched, "base_layer", untouched)).float()
        held = dequantize_module_weight(layer.get_base_layer()).float()
        change = layer.get_delta_weight("default").float()
        after = held @ change.T if isinstance(module, OFTLayer) else held + change  # OFT rotates the inputs
        if magnitudes := getattr(layer, "lora_magnitude_vector", None):  # DoRA
            after = after * (magnitudes["default"].weight / after.norm(dim=1))[:, None]
        total += float((after - before).square().sum())
    return math.sqrt(total)
