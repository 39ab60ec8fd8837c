"""Draw docs/images/method.png, the figure of docs/method.md: `.venv/bin/python docs/make_method_figure.py [FILE]`.

A layer with two inputs: activations of the task's text and of the text to be preserved, the directions of largest and
smallest quotient, one step of Adam, and what `folora_q.core` lets pass of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from folora_q.core import CovarianceSketch, SpectralGate

TARGET = Path(__file__).parent / "images" / "method.png"
STRENGTH = 2.0  # λ of the example; the default is 64, since the quotients of a real layer are larger
DEFAULT_STRENGTH = 64.0
TASK, PENALTY, GATED, GREY, BLACK = "#1f6fb4", "#d1492e", "#1b7837", "#6b6b6b", "#222222"
SPECTRAL, FROZEN = "#7b5aa6", "#d98200"
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


@dataclass(frozen=True)
class Example:
    """The synthetic layer.

    Attributes:
        task, penalty: activations (400, 2) of both texts.
        gate: the gate between them.
        vectors: (2, 2), row i the direction of quotient i.
        step: (2,), a step of Adam for one row of A.
    """

    task: Tensor
    penalty: Tensor
    gate: SpectralGate
    vectors: Tensor
    step: Tensor


def activations(angle: float, long: float, short: float, seed: int) -> Tensor:
    """Return normal samples (400, 2) whose longer axis points at an angle in degrees."""
    turn = np.deg2rad(angle)
    axes = torch.tensor([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]], dtype=torch.float32)
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([long, short]) @ axes


def adam_step() -> Tensor:
    """Return AdamW's first step of a row of A: whatever the gradient, its entries are equally long."""
    row = torch.nn.Parameter(torch.zeros(2))
    row.grad = torch.tensor([-0.3, -2.0])
    torch.optim.AdamW([row], lr=1.5, weight_decay=0.0).step()
    return row.detach()


def make_example() -> Example:
    """Return two texts whose activations overlap, the gate between them, and a step."""
    task, penalty = activations(62, 1.0, 0.34, seed=0), activations(8, 1.15, 0.26, seed=1)
    covariances = []
    for text in (penalty, task):
        sketch = CovarianceSketch(2, rank=2, oversampling=0)
        sketch.update(text)
        covariances.append(sketch.covariance())
    gate = SpectralGate.from_covariances(*covariances, ridge=0.01, utility_ridge=0.01, gate_lambda=STRENGTH)
    vectors = (gate.basis.double() @ gate.vectors).float().T
    return Example(task, penalty, gate, vectors, adam_step())


def draw_text(axes: Axes, text: Tensor, color: str) -> None:
    """Draw a text's activations, and its covariance as the ellipse of two standard deviations."""
    axes.scatter(*text[:150].T, s=7, color=color, alpha=0.25, linewidths=0)
    root = torch.linalg.cholesky(text.T @ text / len(text))
    turn = torch.linspace(0, 2 * np.pi, 200)
    axes.plot(*(2 * root @ torch.stack([turn.cos(), turn.sin()])), color=color, linewidth=1.8)


def draw_arrow(axes: Axes, end: Tensor, color: str, width: float) -> None:
    """Draw an arrow from the origin."""
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 20}
    axes.annotate("", end.tolist(), (0, 0), arrowprops=style, zorder=5)


def draw_step(axes: Axes, example: Example) -> None:
    """Draw the left panel: both texts, the directions with their quotients, the step before and after the gate."""
    draw_text(axes, example.penalty, PENALTY)
    draw_text(axes, example.task, TASK)
    for index, vector in enumerate(example.vectors):
        line = torch.stack([-3 * vector / vector.norm(), 3 * vector / vector.norm()])
        axes.plot(*line.T, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)))
        quotient = float(example.gate.quotients[index])
        label = f"$v_{index + 1}$:  γ = {quotient:.1f}"
        place = ((-0.42, 2.62), (2.1, -1.42))[index]
        axes.text(*place, label, color=GREY, fontsize=13, ha=("right", "center")[index], va="center", bbox=WHITE)
    gated = example.gate.apply(example.step[None])[0]
    corner = torch.linalg.solve(example.vectors.T, example.step)[0] * example.vectors[0]
    for part in (corner, example.step - corner):  # the step's two parts, along v₁ and v₂
        axes.plot(*torch.stack([part, example.step]).T, color=BLACK, linewidth=1, linestyle=":")
    draw_arrow(axes, example.step, BLACK, 2.2)
    draw_arrow(axes, gated, GATED, 3.4)
    axes.text(1.62, 1.58, "Adam's\nstep", color=BLACK, fontsize=13, ha="left", va="center")
    first, second = example.gate.values.tolist()
    kept = f"after the gate:\n{first:.2f} of it along $v_1$\n{second:.2f} of it along $v_2$"
    axes.text(-0.5, 1.55, kept, color=GATED, fontsize=13, ha="right", va="center", bbox=WHITE)
    axes.text(1.0, -2.1, "task text: $Σ_t$", color=TASK, fontsize=13, ha="right", va="center")
    axes.text(-2.85, -1.02, "text to be\npreserved: $Σ_p$", color=PENALTY, fontsize=13, ha="left", va="center")
    axes.set(xlim=(-3, 3), ylim=(-2.6, 2.9), xticks=[], yticks=[])
    axes.set_xlabel("first input of the layer")
    axes.set_ylabel("second input")
    axes.set_title("A step before and after the gate", fontsize=14)
    axes.set_aspect("equal")


def draw_rules(axes: Axes, example: Example) -> None:
    """Draw the right panel: the share of a step that passes at each quotient, for each rule."""
    gate = example.gate
    quotients = torch.logspace(-2, 3, 300, dtype=torch.float64)
    state = gate.state_dict() | {"gate_lambda": 1.0, "floor": 0.3}
    curves = (
        (gate, f"rule step, λ = {STRENGTH:g} (left)", GATED, "-"),
        (gate.with_lambda(DEFAULT_STRENGTH), f"rule step, λ = {DEFAULT_STRENGTH:g} (default)", GATED, "--"),
        (SpectralGate.from_state_dict(state), "rule spectral, λ = 1, floor 0.3", SPECTRAL, "-."),
    )
    for shown, label, color, style in curves:
        axes.plot(quotients, shown.gate_of(quotients), color=color, linestyle=style, linewidth=2.2, label=label)
    shares = (quotients / quotients[-1]).sqrt()
    axes.plot(quotients, shares, color=FROZEN, linewidth=2.2, label="rule frozen: proportional to √γ")
    axes.plot(gate.quotients, gate.values, "o", color=GATED, markersize=8)
    for index, shift in enumerate(((14, -16), (-2, 10))):
        place = (float(gate.quotients[index]), float(gate.values[index]))
        axes.annotate(
            f"$v_{index + 1}$", place, shift, textcoords="offset points", color=GATED, fontsize=13, ha="center"
        )
    axes.set(xscale="log", xlim=(1e-2, 1e3), ylim=(0, 1.62), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("quotient γ: task utility per unit of forgetting")
    axes.set_ylabel("s(γ): share of the step that passes", y=0.32)
    axes.set_title("The gate of each rule", fontsize=14)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize=12, frameon=False)


def main(target: Path = TARGET) -> None:
    """Draw the figure into a PNG file."""
    example = make_example()
    with plt.rc_context({"font.size": 12, "axes.edgecolor": "#999999"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained")
        draw_step(left, example)
        draw_rules(right, example)
        figure.savefig(target, dpi=130, facecolor="white", metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
