"""Initializations of LoRA A from gates (docs/method.md, section 4). B stays zero, so the model does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from folora_q.core import SpectralGate
from folora_q.models.adapters import AdapterPair


def initialize_from_gates(
    pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], leading: bool = True
) -> None:
    """Put each A where its gate lets most pass, with the norm that it has; an A without a gate stays.

    B is zero, so the model stays as it is; but until A moves, all that B learns acts on A's rows.

    Args:
        leading: its rows become the leading directions, orthonormal but for their length. Rows that find none left are
            A's own, passed through the gate and made orthogonal to the others. If False, all are A's own, gated.
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
                rows = torch.zeros_like(rows)  # more rows than inputs: the last have nowhere to go
                rows[: len(found) + len(rest)] = torch.cat([found, rest])
            pair.a.copy_(rows * (norm / rows.norm()))  # by one exactly where all passes


def initialize_in_shares(pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], in_nats: bool) -> None:
    """Put each A's rows into its gate's directions, each as long as the share of a step that its direction gets.

    With A frozen and B trained by Adam, whose steps are as long in every column of B, this gates Adam's steps direction
    by direction (docs/method.md, section 4). Where a gate has fewer directions than A has rows, the last rows are zero.

    Args:
        in_nats: the gates' units are those of the loss, so lengths are to one scale in all layers: the squared shares
            of all directions, γ, add up to 1, and a step of rate η costs ½ η² nats to second order. If False, each A
            keeps the norm that it had.
    """
    gated = [pair for pair in pairs if pair.name in gates]
    total = sum(float(gates[pair.name].quotients[: len(pair.a)].sum()) for pair in gated)
    with torch.no_grad():
        for pair in gated:
            norm = pair.a.norm()
            rows = gates[pair.name].gated_rows(len(pair.a))
            pair.a.zero_()
            pair.a[: len(rows)] = rows * (total**-0.5 if in_nats else norm / rows.norm())
