"""Sketches of a real (tiny) model's activations against dense float64 covariances gathered by other means."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.linalg import eigh
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

from folora_q.calibration.collect import StatisticsSettings, build_gates, row_penalties
from folora_q.calibration.gate_store import load_gates, save_gates
from folora_q.calibration.hooks import collect_inputs, shared_inputs
from folora_q.calibration.reading import Reading, _drawn
from folora_q.core import CovarianceSketch, ProjectedCovariance
from folora_q.data.tokens import IGNORED, batches
from folora_q.errors import RunError
from folora_q.models.adapters import adapter_off, adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.progress import StageTimer
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.gate import GateSection
from folora_q.recipe.schema import ModelSection
from tests.conftest import Silent, random_gate

CPU = torch.device("cpu")
ACTIVATION = {"covariance": "activation", "refinements": 0}
FULL = GateSection(rule="step", rank=128, oversampling=0, ridge=0.1, utility_ridge=0.05, gate_lambda=2.0, **ACTIVATION)


def sequences(seed: int, count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (9 + 7 * i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def model(tiny_folder: Path):
    base = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    model = attach_adapter(base, AdapterSection(r=4), seed=0)
    for pair in adapter_pairs(model):  # an adapter that is switched on would change what is seen
        torch.nn.init.normal_(pair.b, generator=torch.Generator().manual_seed(1))
    return model


def dense_covariance(model, name: str, texts: list[list[int]], learned: int = 0) -> torch.Tensor:
    """E[x xᵀ] of one layer's inputs, one unpadded sequence at a time, divided by its mean variance.

    Of the tokens from which one is predicted, or only those that predict the last `learned` of each sequence.
    """
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().get_submodule(name)
    handle = layer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0, -learned - 1 if learned else 0 : -1])
    )
    with torch.no_grad(), model.disable_adapter():
        for ids in texts:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    x = torch.cat(seen).double()
    covariance = x.T @ x / len(x)
    return covariance / covariance.diagonal().mean()


def test_layers_that_read_the_same_tensor_are_found_without_their_names(model) -> None:
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    renamed = {f"layer {i}": module for i, module in enumerate(modules.values())}
    with model.disable_adapter():
        groups = shared_inputs(model, renamed, torch.tensor([[3, 4, 5]]))
    names = list(modules)
    found = [[names[int(name.split()[1])].split(".", 2)[2] for name in group] for group in groups]
    assert found == [
        [f"{i}.{name}" for name in group]
        for i in range(2)
        for group in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    ]


def test_gates_solve_the_dense_problem_of_the_text_without_its_padding(model) -> None:
    proxy, task = sequences(1), sequences(2)
    progress = Silent()
    texts = list(batches(proxy, 4, CPU)), list(batches(task, 4, CPU))
    gates = build_gates(model, *texts, StatisticsSettings(FULL), StageTimer(progress))
    total, *done = progress.stages["statistics of both texts"]
    assert sum(done) == total == 2 * sum(map(len, [*proxy, *task])), "two readings of every token of each"
    assert progress.units["statistics of both texts"] == "tokens"
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        penalty, utility = dense_covariance(model, name, proxy), dense_covariance(model, name, task)
        identity = torch.eye(len(penalty), dtype=torch.float64)
        quotients, vectors = eigh((utility + 0.05 * identity).numpy(), (penalty + 0.1 * identity).numpy())
        assert torch.allclose(gates[name].quotients, torch.tensor(quotients[::-1].copy()), rtol=1e-3, atol=1e-5)
        v = torch.tensor(vectors)
        values = torch.tensor(quotients / (quotients + 2.0))
        expected = v @ torch.diag(values) @ torch.linalg.inv(v)
        assert torch.allclose(gates[name].dense(), expected, atol=2e-3)


def test_of_the_task_only_what_is_learned_counts(model) -> None:
    proxy, task = sequences(1), sequences(2)
    labels = [[IGNORED] * (len(ids) - 2) + ids[-2:] for ids in task]
    texts = list(batches(proxy, 4, CPU)), list(batches(task, 4, CPU, labels))
    gates = build_gates(model, *texts, StatisticsSettings(FULL), StageTimer(Silent()))
    name = "model.layers.1.mlp.down_proj"
    basis, utility = gates[name].basis.double(), dense_covariance(model, name, task, learned=2)
    assert torch.allclose(basis @ gates[name].utility_gram @ basis.T, utility, atol=1e-3 * float(utility.abs().max()))
    whole = dense_covariance(model, name, task)
    assert not torch.allclose(utility, whole, atol=1e-2 * float(whole.abs().max()))


def fisher(model, name: str, texts: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Σ over tokens and over the readers of one input of ‖g‖² x xᵀ, for each label; autograd, a sequence at a time."""
    base = model.get_base_model()
    readers = [base.get_submodule(name)]
    if name.endswith("q_proj"):
        readers += [base.get_submodule(name.replace("q_proj", other)) for other in ("k_proj", "v_proj")]
    total, learned = torch.zeros(readers[0].in_features, readers[0].in_features, dtype=torch.float64), 0
    for ids, wanted in zip(texts, labels, strict=True):
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept.append((args[0], output))

        handles = [reader.register_forward_hook(keep) for reader in readers]
        with torch.enable_grad(), model.disable_adapter():
            embedded = base.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
            logits = base(inputs_embeds=embedded).logits[0, :-1]
            loss = cross_entropy(logits, torch.tensor(wanted[1:]), ignore_index=IGNORED, reduction="sum")
            loss.backward()
        for handle in handles:
            handle.remove()
        learned += sum(label != IGNORED for label in wanted[1:])
        for x, output in kept:
            rows = (x[0].detach() * output.grad[0].norm(dim=-1, keepdim=True)).double()
            total += rows.T @ rows
    return total / learned


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"])
def test_fisher_covariances_are_those_of_autograd_in_one_unit(model, name: str, recompute: bool) -> None:
    proxy, task = sequences(1), sequences(2)
    labels = [[IGNORED] * (len(ids) - 3) + ids[-3:] for ids in task]
    texts = list(batches(proxy, 4, CPU)), list(batches(task, 4, CPU, labels))
    section = FULL.model_copy(update={"covariance": "fisher"})
    gate = build_gates(model, *texts, StatisticsSettings(section, recompute=recompute), StageTimer(Silent()))[name]
    utility, basis = fisher(model, name, task, labels), gate.basis.double()
    found = basis @ gate.utility_gram @ basis.T
    unit = float(utility.trace() / found.trace())  # the mean variance of the penalty, which is drawn
    assert torch.allclose(found, utility / unit, atol=2e-3 * float(utility.abs().max() / unit))
    assert float(gate.penalty_gram.trace()) == pytest.approx(len(basis), rel=1e-3), "in units of its own mean variance"
    assert gate.utility_ridge == pytest.approx(0.05 * float(utility.diagonal().mean() / unit), rel=1e-3)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def exact_fisher(model, name: str, texts: list[list[int]], greedy: bool = False) -> torch.Tensor:
    """E over labels of Σ over tokens of ‖g‖² x xᵀ, by the Jacobian of every position.

    Labels have the model's own probabilities, or are one of the two most likely ones.
    """
    base = model.get_base_model()
    layer = base.get_submodule(name)
    total, count = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64), 0
    for ids in texts:
        kept = []
        handle = layer.register_forward_hook(lambda _, args, output, kept=kept: kept.extend((args[0], output)))
        with torch.enable_grad(), model.disable_adapter():
            embedded = base.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
            logits = base(inputs_embeds=embedded).logits[0, :-1]
        handle.remove()
        x, output = kept
        for position in logits:
            p = position.detach().softmax(-1)
            chances = torch.zeros_like(p).scatter(0, p.topk(2).indices, 0.5) if greedy else p
            # Of the loss with label y: p - e_y.
            cotangents = chances.sqrt()[:, None] * (p - torch.eye(len(p)))
            (g,) = torch.autograd.grad(position, output, cotangents, retain_graph=True, is_grads_batched=True)
            weights = g.double().square().sum((0, 1, 3))  # over labels and outputs, by token
            total += (x[0].detach().double().T * weights) @ x[0].detach().double()
        count += len(logits)
    return total / count


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_labels_of_the_penalty_are_drawn_from_the_model(model, layer: int, greedy: bool) -> None:
    """In the first layer, the gradients of all later tokens add up; with labels of mean 0 as if each were alone."""
    name, text = f"model.layers.{layer}.mlp.down_proj", [ids[:7] for ids in sequences(1, 3)]
    layers = {pair.name: pair.module for pair in adapter_pairs(model)}
    width = layers[name].in_features

    def found(draws: list[int | None]) -> torch.Tensor:
        sink = ProjectedCovariance(torch.eye(width))
        for draw in draws:
            read = [batch._replace(greedy=greedy) for batch in batches(text, 3, CPU)]
            Reading(model, layers, [[name]], weighted=True).feed(read, {name: sink}, draw=draw)
        return sink.mean()

    model.eval()
    with model.disable_adapter():
        drawn, again, of_the_text = found(list(range(60))), found(list(range(60))), found([None])
    expected = exact_fisher(model, name, text, greedy)
    assert torch.equal(drawn, again), "a seed always gives the same labels"
    of_drawn, of_text = (float((each - expected).norm() / expected.norm()) for each in (drawn, of_the_text))
    assert of_drawn < 0.05 and 3 * of_drawn < of_text, (of_drawn, of_text)


def test_statistics_are_free_of_dropout_where_activations_are_recomputed(tmp_path: Path) -> None:
    """OPT's layers apply dropout by their own `training`, which makes transformers recompute them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 260}
    opt = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5)).eval()
    model = get_peft_model(opt, LoraConfig(r=2, target_modules=["fc1", "fc2"], task_type="CAUSAL_LM"))
    text = list(batches(sequences(1), 4, CPU))
    gates = [
        build_gates(model, text, text, StatisticsSettings(FULL, recompute=recompute), StageTimer(Silent()))
        for recompute in (False, True, True)
    ]
    for name, gate in gates[0].items():
        assert all(torch.allclose(gate.penalty_gram, other[name].penalty_gram, atol=1e-4) for other in gates[1:])
    assert all("forward" not in layer.__dict__ for layer in opt.model.decoder.layers)


def test_refinements_find_larger_quotients_and_the_gate_stays_as_small(model) -> None:
    proxy, task = sequences(1), sequences(2)
    text = list(batches(proxy, 4, CPU)), list(batches(task, 4, CPU))
    name = "model.layers.1.mlp.down_proj"
    found = {}
    for refinements in (0, 1, 2, 3):
        section = GateSection(rank=6, oversampling=2, ridge=0.05, refinements=refinements)
        found[refinements] = build_gates(model, *text, StatisticsSettings(section), StageTimer(Silent()))[name]
    whole = GateSection(rank=128, oversampling=0, ridge=0.05, refinements=0)
    best = build_gates(model, *text, StatisticsSettings(whole), StageTimer(Silent()))[name].quotients[:6]
    reached = [gate.quotients[:6] / best for gate in found.values()]
    assert all(bool((more >= less - 1e-3).all()) for less, more in zip(reached, reached[1:], strict=False))
    assert 3 * reached[0].mean() < reached[3].mean() and float(max(map(torch.max, reached))) < 1.002
    assert {gate.basis.shape[1] for gate in found.values()} == {12}
    for gate in found.values():
        identity = torch.eye(12)
        assert torch.allclose(gate.basis.T @ gate.basis, identity, atol=1e-5)
        assert gate.penalty_gram.trace() + gate.penalty_tail * (len(gate.basis) - 12) == pytest.approx(
            len(gate.basis), rel=1e-3
        )


@pytest.mark.parametrize("rows", [1, 4])
def test_gates_do_not_depend_on_the_batch_size(model, rows: int) -> None:
    settings = StatisticsSettings(GateSection(rank=6, oversampling=2, ridge=0.05))
    together, apart = (
        build_gates(
            model, *(list(batches(sequences(seed), size, CPU)) for seed in (1, 2)), settings, StageTimer(Silent())
        )
        for size in (6, rows)
    )
    for name, gate in together.items():
        assert torch.allclose(apart[name].quotients, gate.quotients, rtol=1e-5), name


def test_labels_and_weights_have_the_models_second_moments() -> None:
    """Σ over labels of q w² (e_y - p)(e_y - p)ᵀ against the exact one, which is diag(p) - p pᵀ."""
    logits = torch.tensor([3.0, 1.0, 0.5, -1.0, -3.0, 9.0]).repeat(60_000, 1)
    parts = logits.split(7_000)
    labels, weights = (
        torch.cat(each)
        for each in zip(*(_drawn(part, g) for g in [torch.Generator().manual_seed(0)] for part in parts), strict=True)
    )
    p = logits[0].softmax(-1)
    gradients = weights[:, None] * (p - torch.eye(6)[labels])
    expected = p.diag() - p.outer(p)
    assert float((gradients.T @ gradients / len(labels) - expected).norm()) < 0.02 * float(expected.norm())
    assert float((gradients.mean(0) / expected.diag().sqrt()).abs().max()) < 0.02
    assert labels.bincount(minlength=6)[5] > 0.4 * len(labels), "one in two where the model is sure"
    again = _drawn(logits, torch.Generator().manual_seed(0))
    assert torch.equal(labels, again[0]) and torch.equal(weights, again[1]), "they do not depend on the batches"
    sure = _drawn(torch.tensor([[500.0, 0.0]]), torch.Generator().manual_seed(0))
    assert all(bool(each.isfinite().all()) for each in sure)


def test_labels_by_importance_have_half_the_error_where_the_model_is_sure(model) -> None:
    name, text = "model.layers.1.mlp.down_proj", [ids[:7] for ids in sequences(1, 3)]
    layers = {pair.name: pair.module for pair in adapter_pairs(model)}

    def of_the_model(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return labels, torch.ones(len(labels))

    def error(expected: torch.Tensor) -> float:
        errors = []
        for draw in range(20):
            sink = ProjectedCovariance(torch.eye(len(expected)))
            Reading(model, layers, [[name]], weighted=True).feed(list(batches(text, 3, CPU)), {name: sink}, draw=draw)
            errors.append(float((sink.mean() - expected).norm()))
        return sum(errors)

    head = model.get_base_model().get_output_embeddings().weight
    unsure = head.detach().clone()
    with torch.no_grad():
        head.mul_(60)
    with model.disable_adapter():
        expected = exact_fisher(model, name, text)
        by_importance = error(expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("folora_q.calibration.reading._drawn", of_the_model)
            plain = error(expected)
    with torch.no_grad():
        head.copy_(unsure)
    assert by_importance < 0.6 * plain


def test_a_sure_model_has_gradients_on_greedy_text_only(model) -> None:
    """Where the next token has a probability of almost 1, drawn labels have no gradient, and the answer may change."""
    name, text = "model.layers.1.mlp.down_proj", [ids[:7] for ids in sequences(1, 3)]
    layers = {pair.name: pair.module for pair in adapter_pairs(model)}

    def penalty(greedy: bool) -> float:
        sink = ProjectedCovariance(torch.eye(layers[name].in_features))
        read = [batch._replace(greedy=greedy) for batch in batches(text, 3, CPU)]
        Reading(model, layers, [[name]], weighted=True).feed(read, {name: sink}, draw=0)
        return float(sink.mean().trace())

    head = model.get_base_model().get_output_embeddings().weight
    unsure = head.detach().clone()
    with model.disable_adapter(), torch.no_grad():
        head.mul_(1e4)
        of_drawn, of_two = penalty(False), penalty(True)
        head.copy_(unsure)
    assert of_two > 0 and of_drawn < 1e-3 * of_two


def test_the_penalty_of_as_rows_is_that_of_the_dense_covariance_of_each_text(model) -> None:
    seen, unseen = sequences(1), sequences(3)
    texts = [list(batches(text, 4, CPU)) for text in (seen, unseen)]
    section = GateSection(rank=4, oversampling=4, **ACTIVATION)
    gates = build_gates(model, texts[0], texts[1], StatisticsSettings(section), StageTimer(Silent()))
    gates.pop("model.layers.1.mlp.down_proj")  # as if no token had reached it
    found = row_penalties(model, gates, tuple(texts), StatisticsSettings(section), StageTimer(Silent()))
    assert found.keys() == gates.keys()
    base = model.get_base_model()
    for pair in adapter_pairs(model):
        for number, text in enumerate((seen, unseen)):
            given: list[torch.Tensor] = []
            handle = base.get_submodule(pair.name).register_forward_pre_hook(lambda _, args, g=given: g.append(args[0]))
            with torch.no_grad(), model.disable_adapter():
                for ids in text:
                    model(input_ids=torch.tensor([ids]))
            handle.remove()
            x = torch.cat([each[0, :-1] for each in given]).double()  # the tokens from which one is predicted
            first = next(p for p in adapter_pairs(model) if gates.get(p.name) is gates.get(pair.name))
            if pair.name in found:
                expected = float((x @ first.a.detach().double().T).square().sum() / len(x))
                assert found[pair.name][number] == pytest.approx(expected, rel=1e-3)


def test_layers_with_one_input_share_one_gate(model) -> None:
    section = GateSection(rank=4, oversampling=4, ridge=0.1, utility_ridge=0.1, **ACTIVATION)
    text = list(batches(sequences(1), 4, CPU))
    gates = build_gates(model, text, text, StatisticsSettings(section), StageTimer(Silent()))
    layer = "model.layers.0.self_attn."
    assert gates[layer + "q_proj"] is gates[layer + "k_proj"] is gates[layer + "v_proj"]
    assert gates[layer + "q_proj"] is not gates[layer + "o_proj"]
    assert list(gates) == [pair.name for pair in adapter_pairs(model)]
    # The same text on both sides: with equal ridges no direction is worth more than another.
    assert torch.allclose(gates[layer + "q_proj"].quotients, torch.ones(4, dtype=torch.float64), atol=1e-4)


def test_the_second_pass_makes_quotients_exact_in_their_directions(model) -> None:
    proxy, task = sequences(1), sequences(2)
    text = list(batches(proxy, 4, CPU)), list(batches(task, 4, CPU))
    name = "model.layers.1.mlp.gate_proj"
    penalty, utility = dense_covariance(model, name, proxy), dense_covariance(model, name, task)

    def error(second_pass: bool) -> float:
        section = GateSection(
            rank=6, oversampling=2, second_pass=second_pass, ridge=0.1, utility_ridge=0.0, **ACTIVATION
        )
        gate = build_gates(model, *text, StatisticsSettings(section), StageTimer(Silent()))[name]
        directions = gate.basis.double() @ gate.vectors
        true = torch.einsum("di,de,ei->i", directions, utility, directions) / (
            torch.einsum("di,de,ei->i", directions, penalty, directions) + 0.1 * directions.square().sum(0)
        )
        return float((gate.quotients / true - 1).abs().max())

    assert error(True) < 1e-3 < error(False)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_and_the_mode_is_evaluation_afterwards(model) -> None:
    text = list(batches(sequences(1, 2), 4, CPU))
    before = hooks(model)
    build_gates(model, text, text, StatisticsSettings(GateSection(rank=4, oversampling=0)), StageTimer(Silent()))
    assert hooks(model) == before


def test_a_nan_activation_is_refused_with_the_layers_name(model) -> None:
    before, settings = hooks(model), StatisticsSettings(GateSection(rank=4, oversampling=0))
    norm = model.get_base_model().model.layers[1].input_layernorm
    kept = norm.weight.data.clone()
    norm.weight.data[0] = float("nan")
    text = list(batches(sequences(1, 2), 4, CPU))
    try:
        with pytest.raises(RunError, match=r"hold a NaN or an infinity, at the input of model.layers.1.self_attn.q_"):
            build_gates(model, text, text, settings, StageTimer(Silent()))
    finally:
        norm.weight.data = kept
    assert hooks(model) == before, "an error must not leave hooks behind"


def test_a_mask_of_another_shape_masks_nothing() -> None:
    """Experts are given tokens picked out of the batch, (n, d): the batch's mask (b, t) says nothing about them."""
    layer = torch.nn.Linear(8, 8)
    sketch = CovarianceSketch(8, 4)
    with collect_inputs({"expert": layer}, {"expert": sketch}) as counted:
        counted.count(torch.tensor([[1, 1, 0], [1, 0, 0]]))
        layer(torch.randn(2, 3, 8))
        assert sketch.count == 3
        layer(torch.randn(5, 8))
        assert sketch.count == 8


@pytest.mark.parametrize("covariance", ["fisher", "activation"])
def test_the_host_waits_for_the_device_once_a_batch_and_not_for_each_layer(model, covariance: str) -> None:
    """Reading a scalar (aten::_local_scalar_dense) or a number of indices (aten::nonzero) waits for a GPU."""
    section = GateSection(rank=4, oversampling=0, covariance=covariance)

    class Waits(TorchDispatchMode):
        counts: Counter[str] = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    def waits(layers: int) -> int:
        modules = {pair.name: pair.module for pair in adapter_pairs(model)[:layers]}
        reading = Reading(model, modules, [[name] for name in modules], section.weighted)
        text = list(batches(sequences(1, 2), 4, CPU))
        sinks = {name: CovarianceSketch(module.in_features, 4) for name, module in modules.items()}
        with adapter_off(model), Waits() as seen:
            seen.counts.clear()
            reading.feed(text, sinks, draw=0 if section.weighted else None)
        return sum(seen.counts[name] for name in ("_local_scalar_dense", "nonzero", "masked_select"))

    assert 0 < waits(2) == waits(len(adapter_pairs(model)))


def test_gates_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    shared, other = random_gate(24), random_gate(40, gate_lambda=3.0)
    gates = {"q": shared, "k": shared, "down": other}
    save_gates(tmp_path / "gates.safetensors", gates)
    found = load_gates(tmp_path / "gates.safetensors")
    assert list(found) == ["q", "k", "down"]
    assert found["q"] is found["k"]
    for name, gate in gates.items():
        assert torch.equal(found[name].basis, gate.basis)
        assert torch.equal(found[name].quotients, gate.quotients)
        assert torch.equal(found[name].core, gate.core)
        assert found[name].gate_lambda == gate.gate_lambda


def test_sketches_that_do_not_fit_together_are_taken_in_rounds_with_the_same_result(model) -> None:
    texts = list(batches(sequences(1), 4, CPU)), list(batches(sequences(2), 4, CPU))
    section = GateSection(rank=6, oversampling=2)
    at_once = build_gates(model, *texts, StatisticsSettings(section), StageTimer(Silent()))
    progress = Silent()
    one_layer = 128 * 12 * 4 / 2**30  # of the widest: 128 features, a joint basis of 12 columns
    partition_by_memory = build_gates(
        model, *texts, StatisticsSettings(section, memory=one_layer), StageTimer(progress)
    )
    rounds = int(progress.notes[-1].split()[2])
    assert progress.notes[-1] == f"statistics in {rounds} rounds, by proxy.statistics_memory"
    assert 4 <= rounds <= 8, "eight inputs, of which two narrow ones fit together"
    total, *done = progress.stages["statistics of both texts"]
    assert sum(done) == total
    assert list(partition_by_memory) == list(at_once)
    for name, gate in at_once.items():
        assert torch.equal(gate.quotients, partition_by_memory[name].quotients), name
        assert torch.equal(gate.basis, partition_by_memory[name].basis)
    assert partition_by_memory["model.layers.0.mlp.up_proj"] is partition_by_memory["model.layers.0.mlp.gate_proj"]


def test_where_memory_runs_out_the_text_is_read_again_in_halves_and_counted_once(model, monkeypatch) -> None:
    texts = list(batches(sequences(1), 4, CPU)), list(batches(sequences(2), 4, CPU))
    counted: list[int] = []
    covariance = CovarianceSketch.covariance
    monkeypatch.setattr(CovarianceSketch, "covariance", lambda self: counted.append(self.count) or covariance(self))
    expected = build_gates(model, *texts, StatisticsSettings(FULL), StageTimer(Silent()))
    once = counted.copy()
    counted.clear()
    taken: list[int] = []
    # In the last layer, when the sketches of all others have seen the batch.
    last = model.get_base_model().model.layers[1].mlp.down_proj

    def hook(module, args) -> None:
        taken.append(len(args[0]))
        if len(args[0]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = last.register_forward_pre_hook(hook)
    progress = Silent()
    try:
        found = build_gates(model, *texts, StatisticsSettings(FULL), StageTimer(progress))
    finally:
        handle.remove()
    assert counted == once, "every token of every input, once"
    assert [line.split(";")[1] for line in progress.warnings] == [" continuing with 2", " continuing with 1"]
    assert set(taken[3:]) == {1}
    for name, gate in expected.items():
        assert torch.allclose(found[name].quotients, gate.quotients, rtol=1e-3, atol=1e-6), name


def test_the_bases_dtype_is_the_recipes(model) -> None:
    text = list(batches(sequences(1, 2), 4, CPU))
    for name, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        section = GateSection(rank=4, oversampling=0, basis_dtype=name)
        gates = build_gates(model, text, text, StatisticsSettings(section), StageTimer(Silent()))
        assert {gate.basis.dtype for gate in gates.values()} == {dtype}


def test_sketches_that_do_not_fit_at_all_are_a_sentence(model, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("folora_q.calibration.collect.CovarianceSketch", full)
    text = list(batches(sequences(1, 2), 4, CPU))
    with pytest.raises(RunError, match="memory ran out for the sketches of 8 layers' inputs"):
        build_gates(model, text, text, StatisticsSettings(GateSection(rank=4)), StageTimer(Silent()))
