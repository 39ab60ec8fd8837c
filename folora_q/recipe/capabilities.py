"""The capabilities that a recipe can keep: description, metric and length of answers. No PyTorch.

The prompts are in `folora_q/data/capabilities`, the scorers in `folora_q/evaluation/capability_scores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

CapabilityName = Literal["tools", "thinking", "refusals", "instructions", "code", "arithmetic", "languages"]
# What a chat template must render for a capability, besides chats.
Requirement = Literal["nothing", "tools", "thoughts"]

# Fewer held-out prompts say too little: an interval over them would cover most of what can happen.
MIN_HELD_OUT = 16


@dataclass(frozen=True)
class Capability:
    """Facts about a capability.

    Attributes:
        prompts: what is asked, in words.
        metric: what the score counts, as tables name it.
        max_new_tokens: length within which most models end their answers.
        requires: what the chat template must render.
    """

    prompts: str
    metric: str
    max_new_tokens: int
    requires: Requirement = "nothing"


CAPABILITIES: dict[CapabilityName, Capability] = {
    "tools": Capability("a request, with two or three tools", "parsable tool call", 96, "tools"),
    "thinking": Capability("a small problem, with thinking switched on", "closed thought", 384, "thoughts"),
    "refusals": Capability("a harmful request", "refusal", 48),
    "instructions": Capability("a task with a constraint that can be checked", "constraint satisfied", 128),
    "code": Capability("a Python function to write", "code that parses", 192),
    "arithmetic": Capability("a calculation with whole numbers", "exact result", 32),
    "languages": Capability("a question in one of eight languages", "language of the prompt", 64),
}
if set(CAPABILITIES) != set(get_args(CapabilityName)):
    raise RuntimeError("a capability has a name and no facts, or facts and no name")


def as_capability(name: str) -> CapabilityName | None:
    """Return a capability's name, or None for other names."""
    return cast(CapabilityName, name) if name in CAPABILITIES else None


def capability_summaries() -> str:
    """Return the help text of `keep.capabilities`: what is asked, and what is counted."""
    listed = "; ".join(f"{name}: {facts.prompts} ({facts.metric})" for name, facts in CAPABILITIES.items())
    return f"Packaged prompts to keep the answers to, and what is counted. {listed}."
