"""Where the model moved, against dense products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight

from folora_q.core import CovarianceSketch, SpectralGate
from folora_q.data.tokens import batches
from folora_q.evaluation.drift import adapted_layers, measured_drift, predicted_drift, update_norm
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection

CPU = torch.device("cpu")
TEXT = [[3, 40, 50, 60, 70], [9, 8, 7], [100, 101, 102, 103], [5, 6]]


def loaded(folder: Path) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(folder)), Hardware(CPU, torch.float32, "a test"))


def tuned_on(base: LoadedModel, **config):
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def inputs_of(model, layer: torch.nn.Module) -> torch.Tensor:
    """Every unpadded token's input to a layer of the base, (n, d)."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), model.disable_adapter():
        for ids in TEXT:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    return torch.cat([x[0] for x in seen]).double()


def dense_drift(model, module) -> float:
    x = inputs_of(model, module.base_layer)
    weight = dequantize_module_weight(module.base_layer).double()
    delta = module.get_delta_weight("default").detach().double()
    return float(((x @ delta.T) ** 2).sum() / ((x @ weight.T) ** 2).sum())


@pytest.mark.parametrize("size", [1, 3])
def test_measured_drift_is_the_dense_ratio_whatever_is_padded(tiny_folder: Path, size: int) -> None:
    model = tuned_on(loaded(tiny_folder))
    found = measured_drift(ModelPair(model), batches(TEXT, size, CPU))
    layers = adapted_layers(model)
    assert found.keys() == layers.keys()
    for name in found:
        assert found[name] == pytest.approx(dense_drift(model, layers[name]), rel=1e-3), name


def test_other_adapters_than_plain_lora_are_measured_by_their_outputs(tiny_folder: Path) -> None:
    model = tuned_on(loaded(tiny_folder), use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = measured_drift(ModelPair(model), batches(TEXT, 2, CPU))
    for name, module in adapted_layers(model).items():
        x = inputs_of(model, module.base_layer).float()
        with torch.no_grad():
            out = module.base_layer(x)
            expected = float((module(x) - out).square().sum() / out.square().sum())
        assert found[name] == pytest.approx(expected, rel=1e-3), name
        assert update_norm(module) is None
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_two_models_differ_where_their_weights_do(tiny_folder: Path) -> None:
    base, tuned = loaded(tiny_folder).model, loaded(tiny_folder).model
    moved = dict(tuned.named_modules())["model.layers.1.mlp.up_proj"]
    moved.quant_state = None
    moved.weight.quant_state.absmax = moved.weight.quant_state.absmax.clone()
    linear = torch.nn.Linear(64, 128, bias=False)
    linear.weight.data = dequantize_module_weight(moved).float() * 1.5
    tuned.model.layers[1].mlp.up_proj = linear
    found = measured_drift(ModelPair(tuned, base), batches(TEXT, 2, CPU))
    assert found.pop("model.layers.1.mlp.up_proj") == pytest.approx(0.25, rel=1e-4)
    assert set(found.values()) == {0.0} and len(found) == 13
    assert "lm_head" not in found


def test_predicted_drift_is_the_measured_where_the_sketch_is_complete(tiny_folder: Path) -> None:
    base = loaded(tiny_folder)
    model = attach_adapter(base, AdapterSection(r=4, target_modules=["q_proj", "down_proj"]), seed=0).eval()
    pairs = adapter_pairs(model)
    gates = {}
    for number, pair in enumerate(pairs):
        torch.nn.init.normal_(pair.b, std=0.3, generator=torch.Generator().manual_seed(number))
        width = pair.module.in_features
        sketch = CovarianceSketch(width, width)
        sketch.update(inputs_of(model, pair.module.base_layer).float())
        other = CovarianceSketch(width, width)
        other.update(torch.randn(64, width, generator=torch.Generator().manual_seed(number)))
        gates[pair.name] = SpectralGate.from_covariances(sketch.covariance(), other.covariance())
    measured, predicted = measured_drift(ModelPair(model), batches(TEXT, 2, CPU)), predicted_drift(model, gates)
    for pair in pairs:
        assert predicted[pair.name]["own"] == pytest.approx(measured[pair.name], rel=2e-3), pair.name
        assert predicted[pair.name]["task"] != pytest.approx(measured[pair.name], rel=2e-3)


def test_the_update_norm_is_that_of_all_active_adapters_together(tiny_folder: Path) -> None:
    model = tuned_on(loaded(tiny_folder))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.base_model.set_adapter(["default", "second"])
    for name, module in adapted_layers(model).items():
        there = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        change = sum(module.get_delta_weight(adapter).double() for adapter in there)
        assert update_norm(module) == pytest.approx(change.norm().item(), rel=1e-5), name
    assert measured_drift(ModelPair(model), batches(TEXT, 2, CPU))["model.layers.0.self_attn.q_proj"] > 0
