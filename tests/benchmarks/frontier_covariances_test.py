"""Exact covariances are those of the activations themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.frontier.covariances import Covariances, measure
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
    found = measure(model, list(batches(TEXTS, 2, torch.device("cpu"))))[name]
    tokens = torch.cat(rows)
    expected = (tokens.T @ tokens).float()
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_few_layers_at_a_time_make_no_difference(tiny_folder: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=4, target_modules="all-linear")
    )
    text = list(batches(TEXTS, 2, torch.device("cpu")))
    at_once, one_by_one = (measure(model, text, at_once=size) for size in (2**30, 0))
    assert list(at_once) == list(one_by_one) == [pair.name for pair in adapter_pairs(model)]
    assert all(torch.equal(found, one_by_one[name]) for name, found in at_once.items())


def test_layers_that_read_the_same_tensor_get_the_same_pair() -> None:
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 4, generator=chance) for _ in range(2))
    found = Covariances({"q": a, "k": a, "o": b}, {"q": b, "k": b, "o": b})
    first = found["q"]
    assert first is found["k"] and first is not found["o"] and list(found) == ["q", "k", "o"] and len(found) == 3
    assert torch.allclose(first[0], a.double() / a.diagonal().double().mean())
    assert first[0].diagonal().mean() == pytest.approx(1.0)
