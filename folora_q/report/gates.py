"""Describe gates in words: which layers share them, and how much they let pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from folora_q.errors import UserError
from folora_q.report.layers import joint_name, place_of, short_names
from folora_q.runs.results import GateResult

# Maximum number of gates to show in detail.
MAX_NAMED_LAYERS = 4


def find_gates(gates: Sequence[GateResult], asked: str) -> list[GateResult]:
    """Return the gates of the modules whose name is `asked`, ends with it, or matches it as a pattern with * and ?.

    Raises:
        UserError: none matches, or too many do.
    """
    found = [gate for gate in gates if any(_matches(name, asked) for name in gate.modules)]
    if not found:
        names = [name for gate in gates for name in gate.modules]
        length = asked.count(".") + 1
        ends = list(dict.fromkeys(".".join(name.split(".")[-length:]) for name in names))
        near = get_close_matches(asked, ends, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "leave out --module to see all of them"
        raise UserError(f"no gated module is called {asked}", hint)
    if len(found) > MAX_NAMED_LAYERS:
        middle = found[len(found) // 2].modules
        one = next(name for name in middle if _matches(name, asked))
        raise UserError(f"{asked} matches {len(found)} gates", f"name one, e.g. --module {one}")
    return found


def shared_by(gates: Sequence[GateResult]) -> list[str]:
    """Return the kinds of module that share gates, in short: q/k/v_proj."""
    short = short_names(name for gate in gates for name in gate.modules)
    found = []
    for gate in gates:
        places = [place_of(name) for name in gate.modules]
        if len(places) > 1:
            found.append(joint_name(list(dict.fromkeys(short[place.stem, place.kind] for place in places))))
    return list(dict.fromkeys(found))


def passing(gates: Sequence[GateResult]) -> tuple[int, int]:
    """Return the number of directions that pass more than half of their step, and of all, including unresolved ones."""
    over = sum(
        sum(value > 0.5 for value in gate.values) + (gate.dim - len(gate.values) if gate.complement_value > 0.5 else 0)
        for gate in gates
    )
    return over, sum(gate.dim for gate in gates)


def mean_value(gates: Sequence[GateResult]) -> float:
    """Return the mean share of a step that passes, over all directions of all gates."""
    known = [gate for gate in gates if gate.dim > 0]
    return sum(gate.mean_value * gate.dim for gate in known) / sum(gate.dim for gate in known)


def heldout_penalties(gates: Sequence[GateResult]) -> tuple[float, float] | None:
    """Return the penalty of A's rows summed over all gates, in sample and held out; None if not measured."""
    known = [gate for gate in gates if gate.penalty is not None and gate.heldout_penalty is not None]
    inside, outside = (sum(getattr(gate, name) for gate in known) for name in ("penalty", "heldout_penalty"))
    return (inside, outside) if 0 < inside < math.inf and 0 < outside < math.inf else None


def _matches(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f".{asked}") or fnmatchcase(name, asked) or fnmatchcase(name, f"*.{asked}")
