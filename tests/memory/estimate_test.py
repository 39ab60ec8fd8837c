"""Parts of an estimate beside what the parts really take, and how settings move them."""

from __future__ import annotations

from pathlib import Path

import pytest

from folora_q.core import sketch
from folora_q.memory.activations import BatchShape, kept_with_checkpointing, passing_head
from folora_q.memory.advice import Advice, advise
from folora_q.memory.components import (
    STATES,
    adapter_parameters,
    arithmetic,
    gates,
    input_spaces,
    optimizer_state,
    sketches,
    weights,
)
from folora_q.memory.estimate import GIB, PARTS, READ_ROWS, MemoryEstimate, estimate
from folora_q.memory.micro_batches import plan_step
from folora_q.memory.shapes import shape_of
from folora_q.recipe.training import TrainingSection
from tests.memory.recipes import LLAMA_8B, MISTRAL_7B, QWEN_7B, SMALL_LLAMA, a_recipe

SMALL, MISTRAL = shape_of(SMALL_LLAMA), shape_of(MISTRAL_7B)


def stage(found: MemoryEstimate, name: str) -> dict[str, int]:
    return next(stage.device for stage in found.stages if stage.name == name)


def test_a_sketch_converts_as_many_rows_as_the_estimate_counts() -> None:
    assert READ_ROWS == sketch.ROWS


# Parts


def test_the_weights_are_those_of_published_models() -> None:
    billions = [round(shape_of(config).parameters / 1e9, 3) for config in (MISTRAL_7B, LLAMA_8B, QWEN_7B)]
    assert billions == [7.248, 8.030, 7.616]  # as the hub's pages have them
    # The paper: constants take 0.5 bits a weight, and 0.127 with double quantization.
    for double, bits in ((False, 0.5), (True, 0.127)):
        found = weights(MISTRAL, double, 2)
        assert found["4-bit weights"] == MISTRAL.quantized // 2
        assert found["their constants"] * 8 / MISTRAL.quantized == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize("double", [True, False])
def test_quantized_weights_are_as_large_as_bitsandbytes_makes_them(double: bool) -> None:
    import bitsandbytes as bnb
    import torch

    module = bnb.nn.Linear4bit(640, 256, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    state = module.weight.quant_state
    constants = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert module.weight.dtype == torch.uint8
    from folora_q.memory.shapes import Layer, Linear, ModelShape

    linear = Linear("a", 640, 256, "a")
    shape = ModelShape("one", 1, 1, 1, 1, 1, 1, ((Layer((linear,), (), 0), 1),), 0, True)
    found = weights(shape, double, 2)
    assert (found["4-bit weights"], found["their constants"]) == (module.weight.nbytes, constants)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"]])
def test_the_adapter_is_as_large_as_pefts(targets: str | list[str]) -> None:
    from tests.memory.models import adapted_4bit

    model = adapted_4bit(SMALL_LLAMA, 6, target_modules=targets)
    how = arithmetic(a_recipe(adapter={"r": 6, "target_modules": targets}), SMALL, on_gpu=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(SMALL, how) == trained


def test_experts_adapter_is_as_large_as_pefts() -> None:
    from tests.memory.models import adapted_4bit

    config = SMALL_LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    model = adapted_4bit(config, 4)
    how = arithmetic(a_recipe(adapter={"r": 4}), shape_of(config), on_gpu=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(shape_of(config), how) == trained


def test_gates_and_sketches_are_as_large_as_the_real_ones() -> None:
    from folora_q.core import CovarianceSketch
    from tests.conftest import random_gate

    recipe = a_recipe(gate={"rank": 8, "oversampling": 4, "second_pass": False})
    how = arithmetic(recipe, SMALL, on_gpu=False)
    spaces = input_spaces(SMALL, how)
    assert sorted((space.width, space.readers, space.count) for space in spaces) == [
        (128, 1, 2),
        (128, 2, 2),
        (128, 3, 2),
        (256, 1, 2),
    ]
    device = host = held = 0
    tests = {}
    for space in spaces:
        gate, sketch = random_gate(space.width, rank=8), CovarianceSketch(space.width, 8, 4)
        device += space.count * (gate.basis.nbytes + gate.core.nbytes)
        host += space.count * sum(t.nbytes for t in (gate.penalty_gram, gate.utility_gram, gate.vectors))
        held += space.count * sketch.product.nbytes
        tests[space.width] = sketch.test_matrix.nbytes
    assert gates(recipe, SMALL, how, on_gpu=False) == (device, host)
    assert sketches(recipe, SMALL, how) == held + sum(tests.values())


def test_what_is_kept_makes_the_longest_sequences() -> None:
    small = {"proxy": {"max_new_tokens": 32}, "training": {"output_dir": "x", "max_length": 64}}
    without, kept = (
        estimate(a_recipe(**small, keep=keep), shape_of(MISTRAL_7B)) for keep in ({}, {"capabilities": ["thinking"]})
    )
    by_name = {stage.name: stage.on_device for stage in without.stages}
    larger = [stage.name for stage in kept.stages if stage.on_device > by_name[stage.name]]
    assert larger == ["statistics", "evaluation"]


def test_every_optimizer_has_its_states() -> None:
    named = TrainingSection.model_fields["optim"].annotation.__args__
    assert set(STATES) == set(named) - {"auto"}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop", "adafactor"])
def test_the_state_is_as_large_as_the_optimizers(name: str, tmp_path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    recipe = a_recipe(training={"optim": name}, adapter={"r": 20})
    how = arithmetic(recipe, SMALL, on_gpu=False)
    sizes = [(20, linear.inputs) for linear, count in SMALL.linears for _ in range(count)]
    sizes += [(linear.outputs, 20) for linear, count in SMALL.linears for _ in range(count)]
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(parameters, **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in key  # no counts, no code tables
    )
    resident, pages = optimizer_state(recipe, SMALL, how, on_gpu=False)
    assert pages == 0
    assert resident == pytest.approx(held, rel=0.02)


def test_paged_states_may_go_to_the_host() -> None:
    recipe = a_recipe(training={"optim": "paged_adamw_8bit"}, adapter={"r": 16})
    how = arithmetic(recipe, MISTRAL, on_gpu=True)
    resident, pages = optimizer_state(recipe, MISTRAL, how, on_gpu=True)
    trained = adapter_parameters(MISTRAL, how)
    assert pages == 32 * 3 * 2 * 16 * 14_336  # those of 100,000 numbers and more
    assert resident + pages == pytest.approx(2 * trained, rel=0.05)
    plain, none = optimizer_state(
        a_recipe(training={"optim": "adamw_torch"}, adapter={"r": 16}), MISTRAL, how, on_gpu=True
    )
    assert (plain, none) == (8 * trained, 0)


# Stages


def test_every_part_has_its_place() -> None:
    found = estimate(a_recipe(), MISTRAL)
    assert [stage.name for stage in found.stages] == ["loading", "sampling", "statistics", "training", "evaluation"]
    assert {name for stage in found.stages for name in stage.device} <= set(PARTS)
    assert found.peak == max(sum(stage.device.values()) for stage in found.stages)
    assert found.host > 0 and found.disk["the model"] == 2 * MISTRAL.parameters


def test_without_a_gate_there_are_no_statistics() -> None:
    found = estimate(a_recipe(gate={"enabled": False}), MISTRAL)
    assert "statistics" not in [stage.name for stage in found.stages]
    assert not stage(found, "training").get("gates")


def test_on_a_cpu_everything_is_the_hosts() -> None:
    found = estimate(a_recipe(), SMALL, "cpu")
    assert "libraries" in found.stages[0].device and found.host == 0
    assert "CUDA context" not in found.stages[0].device


@pytest.mark.parametrize("length", [1, 100, 511, 512, 513, 5000])
def test_statistics_take_short_texts_together_and_no_more_tokens_than_training(length: int) -> None:
    recipe = a_recipe(gate={"batch_size": 16}, training={"per_device_train_batch_size": 2, "max_length": 512})
    rows = recipe.statistics_batch_size(length)
    assert rows == {1: 16, 100: 10, 511: 2, 512: 2}.get(length, 1)
    assert a_recipe(gate={"batch_size": 16, "covariance": "activation"}).statistics_batch_size(length) == 16


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("sampling", {"proxy": {"batch_size": 32}}, {"proxy": {"batch_size": 8}}),
        ("sampling", {"proxy": {"decoding": "paper"}}, {"proxy": {"decoding": "plain"}}),
        ("statistics", {"gate": {"batch_size": 16, "covariance": "activation"}},
         {"gate": {"batch_size": 4, "covariance": "activation"}}),
        ("statistics", {"gate": {"batch_size": 4}}, {"gate": {"batch_size": 2}}),
        ("statistics", {"training": {"per_device_train_batch_size": 4}},
         {"training": {"per_device_train_batch_size": 1}}),
        ("statistics", {"gate": {"refinements": 2}}, {"gate": {"refinements": 1}}),
        ("statistics", {"gate": {"rank": 128}}, {"gate": {"rank": 32}}),
        ("statistics", {"gate": {"second_pass": True}}, {"gate": {"second_pass": False}}),
        ("statistics", {"proxy": {}}, {"proxy": {"statistics_memory": 0.1}}),
        ("training", {"training": {"activation_checkpointing": False}}, {"training": {}}),
        ("training", {"training": {"per_device_train_batch_size": 8}}, {"training": {"max_length": 512}}),
        ("training", {"training": {"optim": "adamw_torch"}}, {"training": {"optim": "adamw_8bit"}}),
        ("training", {"adapter": {"r": 64}}, {"adapter": {"r": 8}}),
        ("training", {"adapter": {"lora_dropout": 0.1}}, {"adapter": {"lora_dropout": 0.0}}),
        ("training", {"gate": {"basis_dtype": "float32"}}, {"gate": {"basis_dtype": "auto"}}),
        ("training", {"model": {"attn_implementation": "eager"}}, {"model": {}}),
        ("training", {"model": {"dtype": "float32"}}, {"model": {"dtype": "bfloat16"}}),
        ("training", {"training": {"packing": True, "per_device_train_batch_size": 1}},
         {"training": {"packing": False, "per_device_train_batch_size": 1}}),
        ("evaluation", {"evaluation": {"batch_size": 16}}, {"evaluation": {"batch_size": 4}}),
        ("evaluation", {"evaluation": {"max_new_tokens": 1024}}, {"evaluation": {"max_new_tokens": 32}}),
        ("loading", {"model": {"bnb_4bit_use_double_quant": False}}, {"model": {}}),
    ],
)  # fmt: skip
def test_a_setting_moves_its_stage(name: str, more: dict, less: dict) -> None:
    large, small = (sum(stage(estimate(a_recipe(**settings), MISTRAL), name).values()) for settings in (more, less))
    assert large > small


def test_adam_in_the_gates_coordinates_needs_less_where_the_rank_is_large() -> None:
    spectral = {"rule": "spectral", "places": ["a_start", "a_step"]}
    plain = {"adapter": {"r": 64}, "training": {"optim": "adamw_torch"}}
    inside, all_of_a = (estimate(a_recipe(gate=gate, **plain), MISTRAL) for gate in (spectral, {}))
    assert stage(inside, "training")["optimizer"] < stage(all_of_a, "training")["optimizer"]


def test_a_frozen_a_is_in_the_adapter_and_in_nothing_else() -> None:
    plain = {"training": {"optim": "adamw_torch"}}
    both = [estimate(a_recipe(gate=gate, **plain), MISTRAL) for gate in ({"rule": "frozen"}, {})]
    assert both[0].disk["gates"] == both[1].disk["gates"] > 0, "gates are written, wherever they stand"
    frozen, all_of_it = (stage(found, "training") for found in both)
    assert frozen["adapter"] == all_of_it["adapter"]
    assert frozen["gradients"] < all_of_it["gradients"] and frozen["optimizer"] == 2 * frozen["gradients"]


def test_an_earlier_adapter_is_as_large_as_its_rank(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    alone, found = (
        estimate(a_recipe(adapter={"r": 16}, model=model), MISTRAL) for model in ({}, {"adapter": str(tmp_path)})
    )
    for name in ("sampling", "statistics", "training", "evaluation"):
        earlier = stage(found, name)["earlier adapter"]
        assert earlier == stage(found, "training")["adapter"] // 2
        assert sum(stage(found, name).values()) == sum(stage(alone, name).values()) + earlier


PUBLISHED = {1024: 6, 2048: 7, 4096: 9, 8192: 12, 16_384: 19, 32_768: 32}


@pytest.mark.parametrize("length", PUBLISHED)
def test_it_is_near_what_others_measured_on_a_gpu(length: int) -> None:
    """Llama-2-7B, batch 1, plain Hugging Face in 4 bits on an A100, with whole logits, in whole GB.

    Source: https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison
    """
    llama = shape_of(LLAMA_8B | {"vocab_size": 32_000, "intermediate_size": 11_008, "num_key_value_heads": 32})
    training = {"max_length": length, "per_device_train_batch_size": 1, "optim": "adamw_torch"}
    recipe = a_recipe(training=training, gate={"enabled": False}, adapter={"r": 8})
    parts = stage(estimate(recipe, llama), "training")
    standing = sum(size for name, size in parts.items() if name not in ("activations", "a layer at work", "logits"))
    how, batch = arithmetic(recipe, llama, on_gpu=True), BatchShape(1, length, masked=False)
    # Accelerate makes a float32 copy of the logits.
    logits = passing_head(llama, batch, how, fused=False) + 4 * length * llama.vocabulary
    found = standing + kept_with_checkpointing(llama, batch, how) + logits
    assert found / 1e9 == pytest.approx(PUBLISHED[length], rel=0.12)


# Advice


def test_what_fits_needs_no_change() -> None:
    recipe = a_recipe(gate={"batch_size": 4})
    assert advise(recipe, MISTRAL, 24) == Advice((), plan_step(recipe, MISTRAL, 24).memory, True)


@pytest.mark.parametrize("card", [8, 12, 16, 24])
def test_advice_makes_it_fit(card: int) -> None:
    large = {"per_device_train_batch_size": 8, "max_length": 4096, "activation_checkpointing": False}
    recipe = a_recipe(training=large)
    assert not estimate(recipe, MISTRAL).fits(card)
    found = advise(recipe, MISTRAL, card)
    assert found.fits
    changed = recipe.model_dump()
    for key, value in found.overrides.items():
        section, name = key.split(".")
        changed[section][name] = value
    again = plan_step(type(recipe).model_validate(changed), MISTRAL, card).memory
    assert again.peak == found.after.peak and again.fits(card)
    training = type(recipe).model_validate(changed).training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32  # the same step


def test_what_a_card_cannot_hold_is_frozen() -> None:
    recipe = a_recipe(training={"max_length": 4096})
    found = advise(recipe, MISTRAL, 6)
    assert found.fits and found.overrides["gate.rule"] == "frozen"
    gate = recipe.gate.model_dump() | {
        key.partition(".")[2]: found.overrides[key] for key in ("gate.rule", "gate.places")
    }
    assert type(recipe.gate).model_validate(gate).places == ["a_start"]


def test_a_strength_is_taken_back_where_a_is_frozen() -> None:
    recipe = a_recipe(training={"max_length": 4096}, gate={"gate_lambda": 16.0, "floor": 0.1})
    found = advise(recipe, MISTRAL, 6).overrides
    gate = recipe.gate.model_dump() | {k.partition(".")[2]: v for k, v in found.items() if k.startswith("gate.")}
    assert type(recipe.gate).model_validate(gate).rule == "frozen"


@pytest.mark.parametrize("gate", [{"enabled": False, "rule": "frozen"}, {"rule": "frozen"}, {"rule": "step"}])
def test_an_optimizer_in_8_bits_is_advised_under_every_rule_that_lets_one_choose(gate: dict) -> None:
    recipe = a_recipe(training={"max_length": 8192, "optim": "adamw_torch"}, gate=gate, adapter={"r": 64})
    assert advise(recipe, MISTRAL, 6).overrides["training.optim"] == "paged_adamw_8bit"


def test_on_a_cpu_what_host_and_device_hold_is_added_up() -> None:
    gpu, cpu = (estimate(a_recipe(gate={"basis_dtype": "float32"}), MISTRAL, device) for device in ("gpu", "cpu"))
    (one, other) = (next(stage for stage in found.stages if stage.name == "training") for found in (gpu, cpu))
    assert other.device["gates"] == one.device["gates"] + one.host["gates"]


def test_what_harms_least_comes_first_and_length_last() -> None:
    gate = {"covariance": "activation"}  # whose batches are the largest
    recipe = a_recipe(training={"max_length": 65_536, "per_device_train_batch_size": 2}, gate=gate)
    kinds = [next(iter(change.overrides)) for change in advise(recipe, MISTRAL, 8).changes]
    assert kinds[0] == "gate.batch_size"
    assert kinds[-1] == "training.max_length"
    assert all(change.saves > 0 for change in advise(recipe, MISTRAL, 8).changes)


def test_nothing_helps_a_model_that_is_larger_than_the_card() -> None:
    found = advise(a_recipe(), MISTRAL, 3)
    assert not found.fits
    assert found.after.peak > 3 * GIB


def test_an_odd_number_of_rows_becomes_one() -> None:
    training = {"per_device_train_batch_size": 5, "max_length": 8192, "gradient_accumulation_steps": 2}
    training["auto_batch_size"] = False  # otherwise the plan finds the rows
    found = advise(a_recipe(training=training), MISTRAL, 8).overrides
    assert found["training.per_device_train_batch_size"] == 1
    assert found["training.gradient_accumulation_steps"] == 10


def test_a_pair_is_two_sequences_and_the_pass_of_its_base_is_below_the_peak() -> None:
    pairs = {"training": {"objective": "dpo", "per_device_train_batch_size": 2}}
    sequences = {"training": {"per_device_train_batch_size": 4}}
    of_pairs, of_sequences = (estimate(a_recipe().changed(each), SMALL) for each in (pairs, sequences))
    assert stage(of_pairs, "training") == stage(of_sequences, "training")


def test_a_labelled_answer_is_one_sequence_and_its_passes_without_gradients_are_below_the_peak() -> None:
    labelled, sequences = ({"training": {"objective": name}} for name in ("kto", "sft"))
    of_labelled, of_sequences = (estimate(a_recipe().changed(each), SMALL) for each in (labelled, sequences))
    assert stage(of_labelled, "training") == stage(of_sequences, "training")
