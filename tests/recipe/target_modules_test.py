"""Names of layers in a recipe, against those of a model; what is taken here is what PEFT takes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from folora_q.memory.names import modules_of_config
from folora_q.models.meta import modules_of
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.target_modules import adapter_findings, targeted

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def messages(config: dict, **settings) -> list[str]:
    found = adapter_findings(AdapterSection(**settings), modules_of_config(config))
    return [message for _, message in found]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj", "v_proj"]}, "the model has no linear layer q_porj (did you mean q_proj?)"),
        ({"target_modules": ["self_attn.q_porj"]}, "(did you mean self_attn.q_proj?)"),
        (
            {"target_modules": ["mlp"]},
            "mlp contains layers but is not one; name the layers: gate_proj, up_proj, down_proj",
        ),
        ({"target_modules": ["embed_tokens"]}, "`adapter.modules_to_save: [embed_tokens]` trains it in full"),
        ({"target_modules": ["all-linear"]}, "all-linear must not be in a list"),
        ({"target_modules": [r".*\.q_proj"]}, r"a regular expression, which must not be in a list"),
        ({"target_modules": r"layers\.0\.q_proj"}, "matches no layer's full name, such as model.layers.0.self_attn.q_"),
        ({"target_modules": r".*layers\.0\..*"}, "also matches model.layers.0.self_attn, which is not a linear layer"),
        ({"exclude_modules": ["v_prj"]}, "v_prj is not a linear layer of the model (did you mean v_proj?)"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_proj"]}, "v_proj has no adapter anyway"),
        ({"exclude_modules": r".*proj"}, "leaves no layer to put an adapter on"),
        ({"exclude_modules": r".*\.x"}, "matches no layer that would get an adapter"),
        ({"modules_to_save": ["embed_token"]}, "(did you mean embed_tokens?); embed_tokens, lm_head can be trained"),
        ({"modules_to_save": ["down_proj"]}, "down_proj is in 4 bits"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "it can only be trained in one way"),
    ],
)
def test_what_is_no_layer_is_named_with_the_nearest(settings: dict, message: str) -> None:
    (found,) = messages(LLAMA, **settings)
    assert message in found


def test_every_wrong_name_has_its_place() -> None:
    section = AdapterSection(target_modules=["q_proj", "x_proj", "y_proj"], modules_to_save=["lm_haed"])
    found = adapter_findings(section, modules_of_config(LLAMA))
    places = [("adapter", "target_modules", 1), ("adapter", "target_modules", 2), ("adapter", "modules_to_save", 0)]
    assert [place for place, _ in found] == places


def test_a_tied_head_gets_no_adapter_of_its_own() -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    for targets in (["lm_head"], r".*(lm_head|q_proj)"):
        (found,) = messages(tied, target_modules=targets)
        assert "tied to embed_tokens" in found and "`adapter.modules_to_save: [embed_tokens]` trains both" in found
    assert not messages(LLAMA, target_modules=["lm_head"])
    (gpt2,) = messages(GPT2, target_modules=["lm_head"])  # whose config.json does not say that it ties them
    assert "tied to wte" in gpt2
    assert not messages(GPT2, modules_to_save=["wte"]) and not messages(tied, modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["lm_head", "model.layers.1.self_attn.k_proj"]},
        {"target_modules": r"model\.layers\.1\.(self_attn|mlp)\.(q|up|down)_proj"},
        {"exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r".*layers\.0\..*"},
    ],
)
def test_the_layers_that_get_an_adapter_are_those_of_peft(settings: dict) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"].from_dict(LLAMA))
    section = AdapterSection(**settings)
    for modules in (modules_of_config(LLAMA), modules_of(model)):
        assert not adapter_findings(section, modules)
        ours = targeted(section, modules)
    names = {"target_modules": section.target_modules, "exclude_modules": section.exclude_modules}
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **names))
    theirs = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(ours) == sorted(name.removeprefix("base_model.model.") for name in theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "q_proj"}, "names go in a list: [q_proj]"),
        ({"target_modules": "q_proj,v_proj"}, "names go in a list: [q_proj, v_proj]"),
        ({"target_modules": "all"}, "did you mean all-linear?"),
        ({"target_modules": []}, "names no layer"),
        ({"target_modules": [3]}, "must be a list of names, or one regular expression, e.g. [q_proj, v_proj], not [3]"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": "(a+)+b"}, "could take forever to match"),
        ({"exclude_modules": "v_proj"}, "names go in a list: [v_proj]"),
        ({"modules_to_save": "embed_tokens"}, "must be a list of names, e.g. [embed_tokens], not 'embed_tokens'"),
        ({"modules_to_save": [""]}, "holds an empty name"),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdapterSection(**settings)
    (error,) = caught.value.errors()
    assert message in error["msg"]


def test_names_from_the_table_are_those_of_the_built_model() -> None:
    from tests.memory.shapes_test import CONFIGS

    compared = 0
    for config in CONFIGS:
        if (ours := modules_of_config(config)) is None:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
        built = modules_of(model)
        assert sorted(ours.linears) == sorted(built.linears), config
        assert list(ours.embeddings) == list(built.embeddings) and ours.head == built.head, config
        assert ours.tied == built.tied and set(ours.others) < set(built.others), config
        compared += 1
    assert compared > 15
