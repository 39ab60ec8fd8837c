"""What training can minimize: facts that do not need PyTorch; `folora_q.training.objectives` has the code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ObjectiveName = Literal["sft", "dpo", "kto"]
# Those that reward answers by their probability in relation to the base.
RewardObjective = Literal["dpo", "kto"]


@dataclass(frozen=True)
class ObjectiveFacts:
    """Facts about an objective.

    Attributes:
        title: its full name.
        sequences: sequences of a row that are trained on.
        readings: forward passes without gradients for each token that is trained on: by the base, and for KL.
        measured: sequences by which rewards are measured, for each that is trained on.
    """

    title: str
    sequences: int = 1
    readings: int = 0
    measured: int = 0


OBJECTIVE_FACTS: dict[ObjectiveName, ObjectiveFacts] = {
    "sft": ObjectiveFacts("supervised fine-tuning"),
    "dpo": ObjectiveFacts("Direct Preference Optimization (DPO)", sequences=2, readings=1, measured=1),
    # The base reads the answer, and both models the mismatched one, which is about as long.
    "kto": ObjectiveFacts("Kahneman-Tversky Optimization (KTO)", readings=3, measured=2),
}
if OBJECTIVE_FACTS.keys() != set(get_args(ObjectiveName)):
    raise TypeError(f"ObjectiveName has {get_args(ObjectiveName)}, OBJECTIVE_FACTS has {tuple(OBJECTIVE_FACTS)}")
# Objectives of other tools, each with why it is not one here.
OTHER_OBJECTIVES = {
    **dict.fromkeys(("orpo", "simpo", "ipo", "cpo"), "the loss on pairs is DPO's own: use dpo"),
    **dict.fromkeys(("pt", "pretrain"), "plain text in a `text` column is learned in full with sft"),
    **dict.fromkeys(("ppo", "grpo", "rloo"), "nothing is generated in training: use dpo on pairs"),
}
