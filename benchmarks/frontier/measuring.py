"""What a tuned model learned and forgot, beside a base whose part is computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.human_eval import Problem, pass_rate
from folora_q.evaluation.divergence import HeldOutText
from folora_q.evaluation.task import greedy_tokens
from folora_q.models.logits import chunks, head_logits, hidden_states


@dataclass(frozen=True)
class Measured:
    """Losses and KL(base ‖ tuned) in nats per token, shares of right answers; ‖ΔW‖ over all adapted layers.

    None is what was not asked for.
    """

    loss: dict[str, float]  # by text
    kl: dict[str, float]  # on text that the base generated
    update_norm: float
    exact: float | None = None
    accuracy: float | None = None
    human_eval: float | None = None  # pass@1


class Yardstick:
    """Measures one model after another on the same text. The base's last hidden states are kept: a few megabytes.

    Args:
        problems: of HumanEval, to be solved too.
    """

    def __init__(self, ground: Ground, problems: Sequence[Problem] = ()) -> None:
        self.ground, self.problems = ground, problems
        self.of_base = {text.name: _states(ground.base, text) for text in ground.on.texts}
        self.base = self.measure(ground.base)

    def measure(self, model: PreTrainedModel | PeftModel, losses: Measured | None = None) -> Measured:
        """Everything of one model; the base itself has a KL and a ‖ΔW‖ of zero.

        Args:
            losses: those of the model, if they are known.
        """
        ground, inner = self.ground, _inner(model)
        model.eval()
        measured = losses or self.losses(model)
        exact = None
        if ground.scorer is not None:
            asked = [question for question in ground.on.questions if question.reference is not None]
            settings = ground.recipe.evaluation
            answers = greedy_tokens(
                inner, ground.tokenizer, [q.ids for q in asked], settings.max_new_tokens, settings.batch_size
            )
            said = [ground.on.reader.read(question, ids) for question, ids in zip(asked, answers, strict=True)]
            exact = sum(ground.scorer(a, q.reference) for a, q in zip(said, asked, strict=True)) / len(asked)
        passed = None
        if self.problems:
            passed = pass_rate(inner, ground.tokenizer, self.problems, ground.recipe.evaluation.batch_size)
        return replace(measured, exact=exact, accuracy=ground.questions.accuracy(inner), human_eval=passed)

    def losses(self, model: PreTrainedModel | PeftModel) -> Measured:
        """What can be measured often: losses, KL and ‖ΔW‖."""
        model.eval()
        losses, kls = {}, {}
        for text in self.ground.on.texts:
            states = _states(_inner(model), text)[1] if model is not self.ground.base else self.of_base[text.name][1]
            losses[text.name], kl = self._compared(_inner(model), text, states)
            if text.kind == "own":
                kls[text.name] = kl
        return Measured(losses, kls, update_norm(self.ground, model) if isinstance(model, PeftModel) else 0.0)

    @torch.no_grad()
    def _compared(self, model: PreTrainedModel, text: HeldOutText, tuned: Tensor) -> tuple[float, float]:
        """The loss, and on text of the base's own the KL from it: elsewhere it would cost as much and mean less."""
        wanted, base = self.of_base[text.name]
        loss = kl = 0.0
        for part in chunks(len(wanted)):
            log_q = log_softmax(head_logits(model, tuned[part], exact=True), -1)
            loss -= float(log_q.gather(-1, wanted[part, None]).sum())
            if text.kind == "own":
                log_p = log_softmax(head_logits(self.ground.base, base[part], exact=True), -1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
        return loss / len(wanted), kl / len(wanted)


def _inner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def _states(model: PreTrainedModel, text: HeldOutText) -> tuple[Tensor, Tensor]:
    """The labelled tokens of a text, (n,), and the hidden states that they are predicted from, (n, h)."""
    wanted, states = [], []
    for batch in text.batches:
        wanted.append(batch.targets)
        states.append(hidden_states(model, batch.input_ids, batch.attention_mask)[batch.loss_positions])
    return torch.cat(wanted), torch.cat(states)


@torch.no_grad()
def update_norm(ground: Ground, model: PeftModel) -> float:
    """‖W' - W‖ over all adapted layers, W' what the tuned layer computes with and W the base's own."""
    total = 0.0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer | OFTLayer):
            continue
        untouched = ground.base.get_submodule(name)
        before = dequantize_module_weight(getattr(untouched, "base_layer", untouched)).float()
        held = dequantize_module_weight(layer.get_base_layer()).float()
        change = layer.get_delta_weight("default").float()
        after = held @ change.T if isinstance(layer, OFTLayer) else held + change  # OFT's is a rotation of the inputs
        if magnitudes := getattr(layer, "lora_magnitude_vector", None):  # DoRA
            after = after * (magnitudes["default"].weight / after.norm(dim=1))[:, None]
        total += float((after - before).square().sum())
    return math.sqrt(total)
