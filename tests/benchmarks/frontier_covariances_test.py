"""Exact covariances are those of the very activations, and a treatment changes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.frontier.covariances import TREATMENTS, Made, Positions, measure
from folora_q.data.tokens import batches
from folora_q.models.adapters import adapter_pairs

TEXTS = [[5, 9, 11, 3, 8, 2, 40], [7, 1, 30], [12, 12, 60, 4]]


def test_moments_are_of_the_tokens_that_count(tiny_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    name = next(pair.name for pair in adapter_pairs(model) if pair.name.endswith("down_proj"))
    seen: list[torch.Tensor] = []
    (pair,) = [pair for pair in adapter_pairs(model) if pair.name == name]
    hook = pair.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        for ids in TEXTS:
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    rows = [x[0, :-1].double() for x in seen]  # nothing is predicted from the last
    found = measure(model, list(batches(TEXTS, 2, torch.device("cpu"))), weighted=False)[name]
    every, later, first = torch.cat(rows), torch.cat([x[1:] for x in rows]), torch.cat([x[:1] for x in rows])
    for covariance, tokens in ((found.every, every), (found.later, later), (found.first, first)):
        expected = tokens.T @ tokens / len(tokens)
        assert torch.allclose(covariance, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_few_layers_at_a_time_make_no_difference(tiny_folder: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=4, target_modules="all-linear")
    )
    text = list(batches(TEXTS, 2, torch.device("cpu")))
    for weighted in (False, True):
        at_once, one_by_one = (measure(model, text, weighted, at_once=size) for size in (2**30, 0))
        assert list(at_once) == list(one_by_one) == [pair.name for pair in adapter_pairs(model)]
        for name, found in at_once.items():
            assert torch.equal(found.every, one_by_one[name].every) and found.n == one_by_one[name].n


def test_layers_that_read_one_tensor_get_one_object(two: tuple[Positions, Positions]) -> None:
    (a, b), calls = two, []
    made = Made({"q": a, "k": a, "o": b}, {"q": b, "k": b, "o": b}, lambda *both: calls.append(both) or list(both))
    assert made["q"] is made["k"] and made["q"] == [a, b] and made["o"] == [b, b]
    assert len(calls) == 2 and len(made) == 3 and list(made) == ["q", "k", "o"]


@pytest.fixture
def two() -> tuple[Positions, Positions]:
    chance = torch.Generator().manual_seed(0)

    def positions() -> Positions:
        later, first = (torch.randn(50, 12, generator=chance, dtype=torch.float64) for _ in range(2))
        first[:, 3] *= 1000  # a massive activation
        return Positions(0.9 * later.T @ later, 0.1 * first.T @ first, 45, 5)

    return positions(), positions()


def test_treatments(two: tuple[Positions, Positions]) -> None:
    treated = {name: [each.normalized for each in treatment(*two)] for name, treatment in TREATMENTS.items()}
    mean = {name: [float(c.diagonal().mean()) for c in both] for name, both in treated.items()}
    for name in ("plain", "first_dropped", "shrunk"):
        assert mean[name] == pytest.approx([1, 1])
    # The massive channel is all of the plain trace, and nothing of the others'.
    for name, expected in (("plain", 12), ("first_dropped", 1), ("first_protected", 13)):
        assert float(treated[name][0][3, 3]) == pytest.approx(expected, rel=0.5)
    others = [i for i in range(12) if i != 3]
    for covariance in treated["robust"]:
        assert float(covariance.diagonal()[others].mean()) == pytest.approx(1)
    for covariance, shrunk in zip(treated["plain"], treated["shrunk"], strict=True):
        assert torch.linalg.eigvalsh(shrunk)[0] >= 0.1
        assert torch.allclose((shrunk - 0.1 * torch.eye(12)) / 0.9, covariance)
