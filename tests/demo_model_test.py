"""The demo's real model, where a tiny random one proves nothing: its file, its words, its massive first activation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from folora_q.calibration.collect import StatisticsSettings, build_gates
from folora_q.calibration.sample import ProxySample, sample_proxy
from folora_q.core import SpectralGate
from folora_q.data.encode import Encoder
from folora_q.data.loading import read_task_data
from folora_q.data.tokens import Batch, batches
from folora_q.data.windows import crops
from folora_q.models.adapters import attach_adapter
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.progress import StageTimer
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.gate import GateSection
from folora_q.recipe.schema import ModelSection, ProxySection
from tests.conftest import Silent

CPU = torch.device("cpu")
TRAIN = Path(__file__).parent.parent / "recipes" / "demo" / "train.jsonl"
SECTION = GateSection(rank=32, covariance="activation", refinements=0)
ORDINARY = ("model.layers.10.self_attn.q_proj", "model.layers.10.mlp.down_proj")
LOUDEST = "model.layers.11.mlp.down_proj"  # one channel of the first token carries nearly the whole trace


@dataclass(frozen=True)
class Real:
    """The model, a little text, the gates of three layers from it, and what those layers are given of it.

    Attributes:
        proxy, task: by layer, one (t, d) float64 tensor a sequence, without padding.
    """

    base: LoadedModel
    model: PeftModel
    samples: list[ProxySample]
    gates: dict[str, SpectralGate]
    proxy: dict[str, list[torch.Tensor]]
    task: dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def real() -> Real:
    """The model comes from the user's cache, or is fetched into it."""
    base = load_model(ModelSection(model_name_or_path=DEMO_MODEL), choose_hardware())
    section = ProxySection(source="mixed", num_samples=6, num_heldout_samples=1, max_new_tokens=24)
    samples = sample_proxy(base.model, base.tokenizer, section)
    names = [name.removeprefix("model.layers.") for name in (*ORDINARY, LOUDEST)]
    model = attach_adapter(base, AdapterSection(target_modules=names), seed=0)
    data = DataSection(train_dataset=str(TRAIN), max_train_samples=8)
    rows = read_task_data(data, seed=0).train
    encoder = Encoder(base.tokenizer)
    encoder.prepare_chats()
    task = [encoded.input_ids for row in rows for encoded in encoder(row)]
    whole = [sample.ids for sample in samples]
    (proxy_batch,) = batches([*whole, *crops(whole, seed=0)], 64, CPU)
    (task_batch,) = batches(task, 64, CPU)
    gates = build_gates(model, [proxy_batch], [task_batch], StatisticsSettings(SECTION), StageTimer(Silent()))
    return Real(base, model, samples, gates, inputs_of(model, proxy_batch), inputs_of(model, task_batch))


def inputs_of(model: PeftModel, batch: Batch) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}
    layers = {name: model.get_base_model().get_submodule(name) for name in (*ORDINARY, LOUDEST)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    lengths = (batch.attention_mask.sum(1) - 1).tolist()  # nothing is predicted from the last token
    return {name: [row[:length] for row, length in zip(x, lengths, strict=True)] for name, x in seen.items()}


def test_every_linear_layer_is_in_4_bits_and_the_model_knows_things(real: Real) -> None:
    assert real.base.quantized_modules == 30 * 7
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = real.base.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad(), real.model.disable_adapter():
        answer = real.model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in real.base.tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


def test_sampled_text_is_the_models_own(real: Real) -> None:
    """Half from the beginning-of-text token, half chats; and likelier to the model than the same words shuffled."""
    assert [s.source for s in real.samples[:4]] == ["bos", "chat", "bos", "chat"]
    start = real.base.tokenizer.bos_token_id
    assert all(s.ids[0] == start for s in real.samples)

    def loss(ids: torch.Tensor) -> float:
        with torch.no_grad(), real.model.disable_adapter():
            return float(real.model(input_ids=ids[None], labels=ids[None]).loss)

    text = [torch.tensor(s.ids) for s in real.samples if s.source == "bos"]
    shuffled = [ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))] for ids in text]
    assert sum(map(loss, text)) < 0.6 * sum(map(loss, shuffled))


@pytest.mark.parametrize("name", [*ORDINARY, LOUDEST])
def test_quotients_are_true_on_real_activations(real: Real, name: str) -> None:
    """Sketched in float32 and solved in a small basis, against dense float64 covariances of the real activations."""
    dense = []
    for texts in (real.proxy, real.task):
        x = torch.cat(texts[name])
        covariance = x.T @ x / len(x)
        dense.append(covariance / covariance.diagonal().mean())
    penalty, utility = dense
    loudness = penalty.diagonal().max() / penalty.diagonal().median()
    assert loudness > 1e6 or name != LOUDEST
    gate = real.gates[name]
    v = gate.basis.double() @ gate.vectors
    cost = torch.einsum("di,de,ei->i", v, penalty, v) + SECTION.ridge * v.square().sum(0)
    use = torch.einsum("di,de,ei->i", v, utility, v) + SECTION.utility_ridge * v.square().sum(0)
    assert torch.allclose(gate.quotients, use / cost, rtol=1e-2)
    rows = torch.randn(8, len(penalty), generator=torch.Generator().manual_seed(0))
    expected = torch.trace(rows.double() @ penalty @ rows.double().T)
    assert torch.isclose(gate.penalty(rows), expected, rtol=0.1)


@pytest.mark.parametrize("name", ORDINARY)
def test_a_gated_step_leaves_the_models_own_text_and_reaches_the_task(real: Real, name: str) -> None:
    """What the gate is for: of an even step's effect, far less is left on the proxy text than on the task's."""
    gate = real.gates[name]
    rows = torch.randn(64, gate.basis.shape[0], generator=torch.Generator().manual_seed(0))

    def kept(x: torch.Tensor) -> float:
        """The share of the step's mean square effect on tokens x (n, d) that passes the gate."""
        step, gated = rows.double(), gate.apply(rows).double()
        return float((x @ gated.T).square().mean() / (x @ step.T).square().mean())

    task = torch.cat([x[20:] for x in real.task[name]])  # past the template, which chats of the model have too
    assert kept(torch.cat(real.proxy[name])) < 0.1 * kept(task)
