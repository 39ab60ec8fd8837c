"""The two update rules: any optimizer's step passed through the gate, and Adam in the gate's coordinates.

Both act on the preconditioned step, never on the gradient: Adam's normalization would undo a gate on the gradient.

    GatedOptimizer     step of any torch optimizer      A += P-gated step,   B += step gated in r x r
    SpectralAdamW      FoLoRA's SAdam (2606.00132 §3)   Ḡ = G V, Adam's moments of Ḡ, step x s, back by Vᵀ
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from folora_q.core.batched_gates import stacks
from folora_q.core.gate import SpectralGate

Adapter = tuple[Tensor, Tensor, SpectralGate]  # A (r, d), B (o, r), the gate of the input space d


# How often in a row B's last good gates are used if new ones cannot be solved for.
TOLERATED_FAILURES = 2


def raise_when_too_many(failures: int, error: Exception) -> None:
    """Raise the error after too many failures in a row; GatedOptimizer's default if B's gates cannot be solved for."""
    if failures > TOLERATED_FAILURES:
        raise error


class GatedOptimizer(Optimizer):
    """Lets any optimizer take its step, then passes each adapter's step through its gate.

    The step of A, row by row, becomes step @ Pᵀ; the step of B becomes step @ K with K the r x r gate at the present A.
    P is oblique and could make a row longer; such a row is scaled back to its length before the gate. A gate of all
    ones leaves AdamW's steps bit for bit unchanged. The inner optimizer alone updates parameters without a gate, except
    for weight decay, which is always decoupled (as AdamW's, arXiv 1711.05101) and not gated. State and parameter groups
    are the inner optimizer's, so schedulers and accelerate work as usual.

    Args:
        inner: e.g. AdamW or bitsandbytes' PagedAdamW8bit; its learning rates are used.
        adapters: (A, B, gate) triples; the gate must be on A's device.
        gate_a, gate_b: which factor's steps are gated.
        refresh_every: steps between two solutions of the r x r problem, which becomes outdated as A changes.
        on_failure: called with the number of failures in a row to solve for B's gates, and the error; if it returns,
            the present gates stay in use. A failure to solve for the first ones is always raised.

    Source: docs/method.md, section 4; tolerated failures: Shampoo's, arXiv 2309.06497.
    """

    def __init__(
        self,
        inner: Optimizer,
        adapters: Iterable[Adapter],
        gate_a: bool = True,
        gate_b: bool = True,
        refresh_every: int = 10,
        on_failure: Callable[[int, Exception], None] = raise_when_too_many,
    ) -> None:
        # Optimizer.__init__ is not called: it would make a second list of parameter groups (as in accelerate).
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
        self.inner = inner
        self.adapters = list(adapters)
        self.gate_a, self.gate_b, self.refresh_every = gate_a, gate_b, refresh_every
        self.on_failure = on_failure
        self.steps_taken = self.failures = 0
        self.stacks = stacks([gate for _, _, gate in self.adapters], [a.shape[0] for a, _, _ in self.adapters])
        alike: dict[tuple, list[int]] = {}  # B's of one shape
        for index, (_, b, _) in enumerate(self.adapters):
            alike.setdefault((b.shape, b.device, b.dtype), []).append(index)
        self.alike = list(alike.values())
        self.rank_gates: list[Tensor] = []
        # ‖step‖² and ‖gated step‖² (rows) of every A and B (columns), summed over the steps at which K was refreshed.
        devices = {a.device for a, _, _ in self.adapters}
        self.energy = torch.zeros(2, 2, len(self.adapters), device=devices.pop() if len(devices) == 1 else "cpu")

    def energy_kept(self) -> list[dict[str, float]]:
        """Return for each adapter the share of its steps' energy that passed the gate, for "a" and "b" if gated.

        Measured at every `refresh_every`-th step. P is oblique, so a share can exceed 1.
        """
        raw, kept = self.energy.tolist()
        return [
            {factor: kept[i][n] / raw[i][n] for i, factor in enumerate("ab") if raw[i][n] > 0}
            for n in range(len(self.adapters))
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.inner.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        first, second = [a for a, _, _ in self.adapters], [b for _, b, _ in self.adapters]
        if self.gate_b and self.steps_taken % self.refresh_every == 0:
            self._solve_rank_gates(first)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            decayed = [p for p in group["params"] if p.grad is not None] if decay else []
            if decayed:
                torch._foreach_mul_(decayed, 1 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        before_a = [a.clone() for a in first] if self.gate_a else []
        before_b = [b.clone() for b in second] if self.gate_b else []
        try:
            self.inner.step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        if self.gate_a:
            for stack in self.stacks:  # A after + (P - I) step: exact where P = I
                self._correct(0, stack.indices, first, before_a, stack.correction)
        if self.gate_b:
            for indices in self.alike:
                gates = torch.stack([self.rank_gates[index] for index in indices])
                self._correct(1, indices, second, before_b, lambda steps, gates=gates: steps @ gates - steps)
        self.steps_taken += 1
        return loss

    def _solve_rank_gates(self, first: list[Tensor]) -> None:
        solved: dict[int, Tensor] = {}
        try:
            for stack in self.stacks:
                found = stack.rank_gates(torch.stack([first[index] for index in stack.indices]))
                solved.update(zip(stack.indices, found, strict=True))
        except (torch.linalg.LinAlgError, ValueError) as error:
            if not self.rank_gates:
                raise
            self.failures += 1
            self.on_failure(self.failures, error)
            return
        self.failures = 0
        self.rank_gates = [solved[index] for index in range(len(first))]

    def _correct(
        self,
        factor: int,
        indices: list[int],
        parameters: list[Tensor],
        before: list[Tensor],
        correction: Callable[[Tensor], Tensor],
    ) -> None:
        """Correct the steps of some A's or B's of one shape, and add up their energy where K was refreshed."""
        chosen = [parameters[index] for index in indices]
        steps = torch.stack(torch._foreach_sub(chosen, [before[index] for index in indices]))
        change = _no_longer(steps, correction(steps))
        torch._foreach_add_(chosen, list(change.unbind()))
        if self.steps_taken % self.refresh_every == 0:
            energies = torch.stack([taken.square().sum((1, 2)) for taken in (steps, steps + change)])
            self.energy[:, factor, indices] += energies.to(self.energy)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the gate's own: the step count and the present r x r gates."""
        return {
            **self.inner.state_dict(),
            "gated": {
                "steps_taken": self.steps_taken,
                "failures": self.failures,
                "rank_gates": list(self.rank_gates),
                "energy": self.energy,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        gated = state_dict.pop("gated")
        self.inner.load_state_dict(state_dict)
        self.steps_taken, self.failures = gated["steps_taken"], gated.get("failures", 0)
        self.energy = gated["energy"].to(self.energy)
        self.rank_gates = [
            k.to(a) for k, (a, _, _) in zip(gated["rank_gates"], self.adapters, strict=bool(gated["rank_gates"]))
        ]


class SpectralAdamW(Optimizer):
    """FoLoRA's SAdam for A, AdamW for B and for every parameter without a gate.

    With V the generalized eigenvectors (VᵀHV = I) and s the gate's values:

        Ḡ = G V;  m̄, v̄: Adam's moments of Ḡ;  ΔĀ = -η m̂ / (√v̂ + ε) ⊙ s;  ΔA = ΔĀ Vᵀ

    V is the truncated basis (d, m), so the moments of A are r x m. Outside of it all directions are treated alike:
    complement="frozen" does not update them (the paper's own truncation, Appendix D), "gated" follows the gradient
    there with one second moment per row and the complement's gate value.

    Args:
        adapters: (A, B, gate) triples.
        lr, betas, eps, weight_decay: AdamW's; decay is decoupled.
        others: parameters without a gate.
        complement: what happens to A's step outside the basis, as above.

    Source: FoLoRA, arXiv 2606.00132, section 3 (SAdam) and Appendix B.3; docs/method.md, section 5.
    """

    def __init__(
        self,
        adapters: Iterable[Adapter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        complement: str = "gated",
        others: Iterable[Tensor] = (),
    ) -> None:
        if complement not in ("gated", "frozen"):
            raise ValueError(f'complement must be "gated" or "frozen", got {complement!r}')
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"bad lr {lr}, eps {eps}, weight_decay {weight_decay} or betas {betas}")
        self.adapters = list(adapters)
        self.complement = complement
        # V = P₀ R, (d, m), is never made: R, the eigenvectors of the small problem, is (m, m), and P₀ is the gate's.
        rotations = {gate: gate.vectors.to(gate.basis.device, torch.float32) for _, _, gate in self.adapters}
        self.rotations = [rotations[gate] for _, _, gate in self.adapters]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        params = [p for a, b, _ in self.adapters for p in (a, b)] + list(others)
        super().__init__([{"params": params}], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gated = {a: index for index, (a, _, _) in enumerate(self.adapters)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                index = gated.get(p)
                if index is None:
                    p.add_(_adam_direction(self.state[p], p.grad, group), alpha=-group["lr"])
                else:
                    p.add_(self._spectral_direction(p, p.grad.float(), index, group), alpha=-group["lr"])
        return loss

    def _spectral_direction(self, a: Tensor, gradient: Tensor, index: int, group: dict[str, Any]) -> Tensor:
        gate, rotation = self.adapters[index][2], self.rotations[index]
        basis = gate.basis.float()
        direction = _adam_direction(self.state[a], gradient @ basis @ rotation, group)  # of Ḡ = G V, (r, m)
        update = (direction * gate.values.to(direction)) @ rotation.T @ basis.T  # ΔA = ΔĀ Vᵀ
        if self.complement == "gated" and gate.complement_size > 0:
            update += self._complement_direction(a, gradient, gate, group)
        return update.to(a)

    def _complement_direction(self, a: Tensor, gradient: Tensor, gate: SpectralGate, group: dict[str, Any]) -> Tensor:
        """Return s_c g_c / (h (√v̂ + ε)): √h g_c are the complement's coordinates, v̂ their mean square per row."""
        p0 = gate.basis.float()
        outside = gradient - (gradient @ p0) @ p0.T
        h = gate.penalty_tail + gate.ridge
        state, beta2 = self.state[a], group["betas"][1]
        mean_square = outside.square().sum(1, keepdim=True) / (h * gate.complement_size)
        second = state.setdefault("complement_sq", torch.zeros_like(mean_square))
        second.mul_(beta2).add_(mean_square, alpha=1 - beta2)
        scale = (second / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        return gate.complement_value * outside / (h * scale)


def _no_longer(steps: Tensor, change: Tensor) -> Tensor:
    """Return the change of each step (..., n), reduced where the changed row would be longer than the step."""
    before, after = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (steps, steps + change))
    kept = (before / after).nan_to_num(1.0).clamp_max(1.0)
    return torch.where(kept < 1, (steps + change) * kept - steps, change)


def _adam_direction(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Return m̂ / (√v̂ + ε), with the moments in `state`; Adam, arXiv 1412.6980, Algorithm 1."""
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
    beta1, beta2 = group["betas"]
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    step_size = 1 / (1 - beta1 ** state["step"])
    denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
    return state["exp_avg"] / denominator * step_size
