"""Initializations of LoRA A from gates (docs/method.md, section 4). B stays zero, so the model does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from folora_q.core import SpectralGate
from folora_q.models.adapters import AdapterPair


def initialize_from_gates(
    pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], leading: bool = True
) -> None:
    """Set each A's rows to directions that pass the gate, with A's norm unchanged; an A without a gate stays.

    B is zero, so the model does not change; but until A changes, everything that B learns acts on A's rows.

    Args:
        leading: the rows become the leading directions, orthonormal up to a common factor. If there are too few, the
            remaining rows are A's own, gated and made orthogonal to the others. If False, all rows are A's own, gated.
    """
    with torch.no_grad():
        for pair in pairs:
            if (gate := gates.get(pair.name)) is None:
                continue
            norm = pair.a.norm()
            rows = gate.apply(pair.a)
            found = gate.leading_rows(len(rows) if leading else 0)
            if len(found):
                rest = torch.linalg.qr(torch.cat([found, rows[len(found) :]]).T).Q.T[len(found) :]
                rows = torch.zeros_like(rows)  # with more rows than inputs the last stay zero
                rows[: len(found) + len(rest)] = torch.cat([found, rest])
            pair.a.copy_(rows * (norm / rows.norm()))  # the factor is exactly 1 if everything passes


def initialize_in_shares(pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], in_nats: bool) -> None:
    """Set each A's rows to its gate's directions, each scaled to the share of a step that the direction gets.

    With A frozen and B trained by Adam, whose steps are equally large in every column of B, this gates Adam's steps by
    direction (docs/method.md, section 4). If a gate has fewer directions than A has rows, the last rows are zero.

    Args:
        in_nats: the gates' units are those of the loss, so all layers share one scale: the squared shares of all
            directions, γ, add up to 1, and a step with learning rate η costs ½ η² nats to second order. If False, each
            A keeps its norm.
    """
    gated = [pair for pair in pairs if pair.name in gates]
    total = sum(float(gates[pair.name].quotients[: len(pair.a)].sum()) for pair in gated)
    with torch.no_grad():
        for pair in gated:
            norm = pair.a.norm()
            rows = gates[pair.name].gated_rows(len(pair.a))
            pair.a.zero_()
            pair.a[: len(rows)] = rows * (total**-0.5 if in_nats else norm / rows.norm())
