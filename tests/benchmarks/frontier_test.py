"""Each method of the frontier has the property that its paper defines it by; the measures are the product's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.oft import OFTLayer
from torch.nn.functional import cross_entropy, log_softmax

from benchmarks.frontier import human_eval
from benchmarks.frontier.__main__ import HERE, TASKS
from benchmarks.frontier.costs import measure
from benchmarks.frontier.measuring import Evaluator, Measured, update_norm
from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.methods.contrastive import ContrastiveLoRA
from benchmarks.frontier.methods.corda import DAMPING, CorDA
from benchmarks.frontier.methods.eva import EVA
from benchmarks.frontier.methods.folora import FoLoRA, FoLoRAStart
from benchmarks.frontier.methods.gated import Gated, PenaltyOnly, SharesShuffled, UtilityOnly
from benchmarks.frontier.methods.lora import DecayedLoRA, DoRA, LoRA, MLPOnlyLoRA, RankStabilizedLoRA
from benchmarks.frontier.methods.lora_null import LoRANull
from benchmarks.frontier.methods.oft import OFT
from benchmarks.frontier.methods.oplora import OPLoRA
from benchmarks.frontier.methods.replay import BaseKL, Replay
from benchmarks.frontier.methods.sc_lora import SCLoRA
from benchmarks.frontier.methods.tmkl import TMKL, non_target_kl
from benchmarks.frontier.questions import log_likelihoods
from benchmarks.frontier.running import BestPoint, Plan, run_plan
from benchmarks.frontier.series import Series, methods
from benchmarks.frontier.testbed import Testbed, decode, generated_text_path
from benchmarks.frontier.training import release, train
from folora_q.calibration.sample import ProxySample
from folora_q.calibration.sample_cache import read_samples, write_samples
from folora_q.core import SpectralGate
from folora_q.errors import RunError
from folora_q.evaluation.divergence import compare
from folora_q.evaluation.model_pair import ModelPair
from folora_q.models.adapters import AdapterPair, adapter_pairs
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model
from folora_q.progress import StageTimer
from folora_q.recipe import load_recipe
from folora_q.recipe.gate import GateSection
from folora_q.runs.results import GENERATED_TEXT
from tests.conftest import Silent, write_recipe

Testbed.__test__ = False  # its name looks like that of a test class

EVERY = [
    LoRA(1e-2),
    DecayedLoRA(1e-2),
    RankStabilizedLoRA(1e-2),
    DoRA(1e-2),
    MLPOnlyLoRA(1e-2),
    LoRANull(1e-2),
    ContrastiveLoRA(1e-2),
    OPLoRA(1e-2, k=8),
    CorDA(1e-2),
    SCLoRA(1e-2),
    TMKL(1e-2),
    Replay(1e-2),
    FoLoRA(1e-2),
    BaseKL(1e-2),
    EVA(1e-2),
    OFT(1e-2, block_size=8),
    Gated(1e-2),
    Gated(1e-2, r=8),
    Gated(1e-2, gate={"rule": "step"}, r=8),
    Gated(1e-2, gate={"rule": "spectral", "places": ["a_start", "a_step"]}, r=8),
    SharesShuffled(1e-2, r=8),
    PenaltyOnly(1e-2),
    UtilityOnly(1e-2),
]


def subclasses(kind: type) -> set[type]:
    return {each for child in kind.__subclasses__() for each in (child, *subclasses(child))}


def test_every_method_is_a_series_under_its_name() -> None:
    series = {each.name: each.points for each in methods()}
    assert len(series) == len(methods())
    ours = {kind for kind in subclasses(Method) if kind.__module__.startswith("benchmarks.")}
    complete = {kind for kind in ours if hasattr(kind, "name")} - {FoLoRAStart}
    assert {type(points[0]) for points in series.values()} == complete
    for kind in complete:
        assert kind.paper and [point.learning_rate for point in series[kind.name]] == list(kind.learning_rates)


@pytest.fixture(scope="module")
def testbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Testbed:
    folder = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_Q_CACHE", str(folder / "cache"))
        recipe = load_recipe(
            write_recipe(folder, tiny_folder),
            [
                "proxy.num_samples=24",
                "proxy.num_heldout_samples=4",
                "training.max_length=64",
                "evaluation.num_answers=2",
            ],
        )
        testbed = Testbed(recipe, folder, StageTimer(Silent()))
        decode(testbed.base)  # as on a CPU: what is merged is then not rounded to 4 bits
        return testbed


def tuned(testbed: Testbed, method: Method, steps: int = 3):
    """After a few steps, and the method that holds what it computed."""
    method = dataclasses.replace(method)
    model, _ = train(testbed, method, seed=1, steps=steps)
    return method, model


@pytest.mark.parametrize("method", EVERY, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'r', '')}")
def test_every_method_learns_and_leaves_the_base_as_it_was(testbed: Testbed, method: Method) -> None:
    before = {name: weight.clone() for name, weight in testbed.base.state_dict().items()}
    text = next(text for text in testbed.heldout.texts if text.kind == "task")
    fresh = Evaluator(testbed)
    start = fresh.base.loss[text.name]
    method, model = tuned(testbed, method, steps=12)
    measured = fresh.measure(model)
    assert measured.loss[text.name] < start - 0.01
    assert measured.update_norm > 0 and measured.kl[GENERATED_TEXT] > 0
    release(method, model)
    after = testbed.base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ours_starts_as_the_product_does_at_any_rank(testbed: Testbed) -> None:
    method, model = tuned(testbed, Gated(1e-2, r=8))
    pairs = adapter_pairs(model)
    scales = []
    for pair in pairs:
        rows = method.layer_gates[pair.name].gated_rows(8)
        assert pair.a.shape[0] == 8 and pair.scale == 1.0 and not pair.a.requires_grad
        scales.append(float(pair.a.norm() / rows.norm()))
        assert torch.allclose(pair.a, rows * scales[-1], atol=1e-5)
    assert max(scales) / min(scales) < 1 + 1e-4, "one scale for all layers"
    release(method, model)


def test_humaneval_is_solved_where_it_is_asked_for(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(human_eval, "MAX_NEW_TOKENS", 8)
    assert Evaluator(testbed, human_eval.problems()[:3]).base.human_eval == 0.0, "a random model writes no function"
    assert Evaluator(testbed).base.human_eval is None


def test_numbers_are_those_of_the_product(testbed: Testbed) -> None:
    evaluator = Evaluator(testbed)
    method, model = tuned(testbed, LoRA(1e-2))
    measured = evaluator.measure(model)
    for text in testbed.heldout.texts:
        expected = compare(ModelPair(model), text)
        assert measured.loss[text.name] == pytest.approx(expected.loss.tuned.value, rel=1e-5)
        assert evaluator.base.loss[text.name] == pytest.approx(expected.loss.base.value, rel=1e-5)
        if text.kind == "own":
            assert measured.kl[text.name] == pytest.approx(expected.kl.value, rel=1e-3, abs=1e-6)
    assert all(kl == pytest.approx(0, abs=1e-6) for kl in evaluator.base.kl.values())
    release(method, model)


@pytest.mark.parametrize("method", [LoRA(1e-2), DoRA(1e-2), CorDA(1e-2), OFT(1e-2, 8)], ids=lambda m: type(m).__name__)
def test_the_norm_of_an_update_is_that_of_the_merged_weights(testbed: Testbed, method: Method) -> None:
    method, model = tuned(testbed, method)
    found = update_norm(testbed, model)
    names = [name for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer | OFTLayer)]
    before = {name: getattr(m := testbed.base.get_submodule(name), "base_layer", m).weight.clone() for name in names}
    merged = model.merge_and_unload()
    total = sum(float((merged.get_submodule(name).weight - before[name]).square().sum()) for name in names)
    assert found == pytest.approx(math.sqrt(total), rel=1e-3)
    if not method.sixteen_bit:  # the shared base was merged into: put it back
        for name in names:
            merged.get_submodule(name).weight.data.copy_(before[name])


def test_decoded_weights_compute_what_four_bits_do(testbed: Testbed, tiny_folder: Path) -> None:
    base = load_model(testbed.recipe.model, choose_hardware("float32")).model
    ids = torch.arange(40, device=base.device)[None]
    with torch.no_grad():
        packed = base(input_ids=ids).logits
        decode(base)
        assert torch.equal(base(input_ids=ids).logits, packed)


def test_null_space_rows_do_nothing_on_the_bases_own_text(testbed: Testbed) -> None:
    method, model = tuned(testbed, LoRANull(1e-2))
    covariances = testbed.covariances(model)
    for pair in adapter_pairs(model):
        penalty, _ = covariances[pair.name]
        least = torch.linalg.eigvalsh(penalty)[: len(pair.a)].sum()
        a = pair.a.detach().double().cpu()
        passed = torch.trace(a @ penalty @ a.T) / a.square().sum() * len(a)  # of unit rows
        assert passed == pytest.approx(float(least), rel=1e-3, abs=1e-6)
        assert passed < 0.3 * len(a)  # of random unit rows each has 1; the tiny model has 64 directions in all
    release(method, model)


def test_contrastive_rows_have_the_largest_quotients_and_stay(testbed: Testbed) -> None:
    method, model = tuned(testbed, ContrastiveLoRA(1e-2))
    covariances = testbed.covariances(model)
    for pair in adapter_pairs(model):
        penalty, utility = covariances[pair.name]
        metric = penalty + method.ridge * torch.eye(len(penalty), dtype=torch.float64)
        a = pair.a.detach().double().cpu()
        assert torch.allclose(a @ a.T * 3, torch.eye(len(a), dtype=torch.float64), atol=1e-5)
        inside = torch.linalg.eigvals(torch.linalg.solve(a @ metric @ a.T, a @ utility @ a.T)).real
        best = torch.linalg.eigvals(torch.linalg.solve(metric, utility)).real.sort(descending=True).values[: len(a)]
        assert torch.allclose(inside.sort(descending=True).values, best, rtol=1e-3)
    release(method, model)


def test_oplora_stays_out_of_the_leading_singular_subspaces(testbed: Testbed) -> None:
    method, model = tuned(testbed, OPLoRA(1e-2, k=8))
    for pair in adapter_pairs(model):
        u, _, vt = torch.linalg.svd(pair.module.get_base_layer().weight.float(), full_matrices=False)
        delta = pair.b.detach() @ pair.a.detach()
        assert delta.norm() > 0
        assert (u[:, :8].T @ delta).norm() < 1e-5 * delta.norm()
        assert (delta @ vt[:8].T).norm() < 1e-5 * delta.norm()
    release(method, model)


@pytest.mark.parametrize("method", [CorDA(1e-2), SCLoRA(1e-2), FoLoRAStart(1e-2)], ids=lambda m: type(m).__name__)
def test_a_moved_start_is_the_base(testbed: Testbed, method: Method) -> None:
    model = testbed.tuned(seed=0, sixteen_bit=True)
    method = dataclasses.replace(method)
    method.start(testbed, model, adapter_pairs(model))
    ids = torch.arange(40, device=testbed.base.device)[None]
    with torch.no_grad():
        moved, base = (m(input_ids=ids).logits for m in (model, testbed.base))
        with model.disable_adapter():
            residual = model(input_ids=ids).logits
    assert torch.allclose(moved, base, atol=1e-3)
    assert not torch.allclose(residual, base, atol=1e-2)


def test_corda_is_pefts(testbed: Testbed) -> None:
    """PEFT's covariance is a sum over samples that it scales itself; here its hook is given the same covariance."""
    model = testbed.tuned(seed=0, sixteen_bit=True)
    covariances = testbed.covariances(model)
    pairs = adapter_pairs(model)
    rank = len(pairs[0].a)
    expected = {}
    for pair in pairs[:3]:
        weight = pair.module.get_base_layer().weight
        a, b = CorDA(1e-2).factors(weight.double().cpu(), *covariances[pair.name], rank)
        expected[pair.name] = b @ a
    copy = testbed.tuned(seed=0, sixteen_bit=True).unload()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(expected),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", prune_temporary_fields=False),
    )
    for name in expected:
        # A linear layer fed with the rows of a root of C has just the covariance C.
        penalty = covariances[name][0]
        copy.get_submodule(name).covariance_matrix_for_test = penalty

    def feed() -> None:
        for name in expected:
            layer = copy.get_submodule(name)
            values, vectors = torch.linalg.eigh(layer.covariance_matrix_for_test)
            layer((vectors * values.clamp_min(0).sqrt()).T.float()[None])

    preprocess_corda(copy, config, run_model=feed)
    theirs = get_peft_model(copy, config)
    for pair in adapter_pairs(theirs):
        found = pair.scale * (pair.b @ pair.a).double()
        assert torch.allclose(found, expected[pair.name], rtol=0.05, atol=0.05 * float(expected[pair.name].abs().max()))
    assert DAMPING == 0.01


def test_sc_lora_takes_the_leading_directions_of_the_contrast(testbed: Testbed) -> None:
    weight = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    penalty, utility = (torch.cov(torch.randn(16, 64, dtype=torch.float64)) for _ in range(2))
    method = SCLoRA(1e-2, beta=0.5)
    a, b = method.factors(weight, penalty, utility, 4)
    contrast = weight @ (0.5 * utility - 0.5 * penalty) @ weight.T
    assert torch.allclose(b.T @ b, torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(a, b.T @ weight)
    assert torch.trace(b.T @ contrast @ b) == pytest.approx(float(torch.linalg.eigvalsh(contrast)[-4:].sum()))


def test_non_target_kl_ignores_the_right_token(testbed: Testbed) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 11, generator=generator) for _ in range(2))
    wanted = torch.tensor([0, 3, 10, 7, 7])
    expected = 0.0
    for row, right in enumerate(wanted):
        others = [i for i in range(11) if i != right]
        log_p, log_q = log_softmax(p[row, others], -1), log_softmax(q[row, others], -1)
        expected += float((log_p.exp() * (log_p - log_q)).sum()) / 5
    assert float(non_target_kl(p, q, wanted)) == pytest.approx(expected, rel=1e-5)
    q.requires_grad_()
    non_target_kl(p, q, wanted).backward()
    assert torch.equal(q.grad[torch.arange(5), wanted], torch.zeros(5))
    raised = p.clone()
    raised[torch.arange(5), wanted] += 3  # another loss on the right token, the same on the others
    assert float(non_target_kl(p, raised, wanted)) == pytest.approx(0, abs=1e-6)
    sure = p.clone()
    sure[0, 0] = 40
    assert float(non_target_kl(sure, q.detach(), wanted)) < float(non_target_kl(p, q.detach(), wanted))


def test_replay_adds_the_loss_on_the_bases_own_text(testbed: Testbed) -> None:
    model = testbed.tuned(seed=0)
    method = Replay(1e-2, weight=2.0)
    method.start(testbed, model, adapter_pairs(model))
    text = method.own[1]
    logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits[:, :-1]
    expected = 2 * cross_entropy(logits.flatten(0, 1), text.labels[:, 1:].flatten(), ignore_index=-100)
    step = dataclasses.replace(_empty_step(), number=1 + len(method.own))
    assert method.penalty(testbed, model, step).item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(len(text.input_ids) for text in method.own) == len(testbed.generated)
    model.unload()


def _empty_step():
    from benchmarks.frontier.methods.base import Step

    nothing = torch.zeros(0)
    return Step(0, nothing, nothing, nothing, nothing, nothing)


def test_the_kl_to_the_base_is_added(testbed: Testbed) -> None:
    method, model = tuned(testbed, BaseKL(1e-2, weight=2.0))
    text = method.own[0]
    ids = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    with torch.no_grad():
        log_q = log_softmax(model(**ids).logits[:, :-1], -1)
        with model.disable_adapter():
            log_p = log_softmax(model(**ids).logits[:, :-1], -1)
    at = text.labels[:, 1:] != -100
    expected = 2 * (log_p.exp() * (log_p - log_q)).sum(-1)[at].mean()
    step = dataclasses.replace(_empty_step(), number=len(method.own))
    found = method.penalty(testbed, model, step)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3) and found.item() > 0 and found.requires_grad
    release(method, model)


def test_shuffling_deals_the_same_shares_to_other_directions(testbed: Testbed) -> None:
    rows = []
    for kind in (Gated, SharesShuffled):
        method, model = tuned(testbed, kind(1e-2, r=8))
        rows.append([pair.a.clone() for pair in adapter_pairs(model)])
        release(method, model)
    lengths = [torch.cat([a.norm(dim=1) for a in each]) for each in rows]
    assert torch.allclose(lengths[0].sort().values, lengths[1].sort().values, rtol=1e-5)
    assert not torch.allclose(*lengths, rtol=0.1)
    for straight, shuffled in zip(*rows, strict=True):
        assert torch.allclose(torch.nn.functional.cosine_similarity(straight, shuffled), torch.ones(8), atol=1e-5)


def test_one_sided_gates_depend_on_one_covariance(testbed: Testbed) -> None:
    model = testbed.tuned(seed=0)
    section = Gated(1e-2).section
    both = testbed.gates(model, section)
    for method, gram in ((PenaltyOnly, "penalty_gram"), (UtilityOnly, "utility_gram")):
        for name, gate in testbed.gates(model, section, kind=method.kind).items():
            kept, other = (gram, {"penalty_gram": "utility_gram", "utility_gram": "penalty_gram"}[gram])
            assert torch.equal(getattr(gate, kept), getattr(both[name], kept))
            assert torch.equal(getattr(gate, other), torch.eye(len(getattr(gate, other)), dtype=torch.float64))
    model.unload()


def test_eva_starts_at_the_tasks_leading_directions_and_trains_them(testbed: Testbed) -> None:
    method, model = tuned(testbed, EVA(1e-6))
    covariances = testbed.covariances(model)
    for pair in adapter_pairs(model):
        _, utility = covariances[pair.name]
        a = pair.a.detach().double().cpu()
        most = torch.linalg.eigvalsh(utility)[-len(a) :].sum()
        assert torch.trace(a @ utility @ a.T) / a.square().sum() * len(a) == pytest.approx(float(most), rel=1e-2)
        assert pair.a.requires_grad
    release(method, model)


def test_choices_side_by_side_are_as_likely_as_each_alone(testbed: Testbed) -> None:
    batch = testbed.questions.batches[-1][:3]
    found = log_likelihoods(testbed.base, batch)
    for question, likelihoods in zip(batch, found, strict=True):
        prompt = [token for token, owner in zip(question.ids, question.owners, strict=True) if owner == 0]
        for number, likelihood in enumerate(likelihoods, 1):
            choice = [token for token, owner in zip(question.ids, question.owners, strict=True) if owner == number]
            ids = torch.tensor([prompt + choice], device=testbed.base.device)
            with torch.no_grad():
                log = log_softmax(testbed.base(input_ids=ids).logits[0, :-1], -1)
            alone = log.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
            assert likelihood == pytest.approx(float(alone), abs=1e-3)
    accuracy = testbed.questions.accuracy(testbed.base)
    answers = [question.answer for rows in testbed.questions.batches for question in rows]
    assert 0 < accuracy < 1 and len(answers) == 170


def test_sketched_statistics_are_kept_for_the_next_process(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    def gates(of: Testbed, **settings: object) -> dict[str, SpectralGate]:
        model = of.tuned(0)
        found = of.gates(model, GateSection(rank=4, **settings))
        model.unload()
        return found

    def refuse(*_: object) -> None:
        raise AssertionError("taken again")

    first = gates(testbed)
    again = Testbed(testbed.recipe, testbed.kept.parent, testbed.clock)
    monkeypatch.setattr("benchmarks.frontier.testbed.build_gates", refuse)
    second = gates(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[layer].quotients, second[layer].quotients) for layer in first)
    with pytest.raises(AssertionError, match="taken again"):
        gates(again, ridge=0.5)


def test_stored_generated_text_is_used(testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.frontier.testbed.DATA", tmp_path)
    number = testbed.recipe.proxy.num_samples + testbed.recipe.proxy.num_heldout_samples
    samples = [ProxySample([5, 6, 7 + i], "bos") for i in range(number)]
    write_samples(generated_text_path(testbed.recipe), samples, testbed.tokenizer)
    again = Testbed(testbed.recipe, tmp_path, testbed.clock)
    assert (
        again.generated == [sample.ids for sample in samples[: testbed.recipe.proxy.num_samples]] != testbed.generated
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_demo_models_generated_text_is_stored_for_every_task(task: str) -> None:
    recipe = load_recipe(HERE / f"{task}.yaml")
    samples = read_samples(generated_text_path(recipe), vocabulary=49152)
    assert samples is not None and len(samples) == recipe.proxy.num_samples + recipe.proxy.num_heldout_samples


def test_plain_lora_is_timed_with_a_method(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLORA_Q_CACHE", str(tmp_path / "cache"))
    settings = ["proxy.num_heldout_samples=4", "training.max_length=64", "evaluation.num_answers=2"]
    recipe = write_recipe(tmp_path, tiny_folder)
    timed, weighed = (measure("replay (CFS)", recipe, settings, tmp_path, timed) for timed in (True, False))
    assert timed.seconds > 0 and timed.plain_seconds > 0
    assert math.isnan(weighed.plain_seconds) and weighed.peak_bytes


def test_a_run_that_exists_is_not_repeated(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLORA_Q_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, tiny_folder)

    def told(*overrides: str, seeds: int = 1) -> list[str]:
        lines: list[str] = []
        settings = ["training.max_length=64", "evaluation.num_answers=2", *overrides]
        plan = Plan(recipe, settings, [Series("LoRA", [LoRA(1e-2)])], range(seeds), 1.0, tmp_path / "runs", points=2)
        run_plan(plan, Silent(), lines.append)
        return lines

    (line,) = told()
    assert line.startswith("recipe 1/1: LoRA, lr 0.01, seed 0: best at step ") and " of 3: task " in line
    assert told() == []
    (line,) = told(seeds=2)
    assert ", seed 1: " in line
    assert len(told("training.per_device_train_batch_size=2")) == 1, "another recipe, another run"
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3


def test_the_adapter_of_the_lowest_held_out_loss_is_restored(testbed: Testbed) -> None:
    evaluator = Evaluator(testbed)
    real: list[Measured] = []
    told = iter((3.0, 1.0, 2.0, 4.0))  # as if it rose again

    class Rising(Evaluator):
        def losses(self, model: PeftModel) -> Measured:
            real.append(evaluator.losses(model))
            return dataclasses.replace(real[-1], loss=real[-1].loss | {"task": next(told, 0.0)})

    rising = Rising.__new__(Rising)
    best = BestPoint(rising, steps=12, points=4)
    model, _ = train(testbed, LoRA(1e-2), 0, 12, best)
    assert list(best.path) == [3, 6, 9, 12] and (best.step, best.loss) == (6, 1.0)
    assert evaluator.losses(model) == real[3] != real[1]
    best.restore(model)
    assert evaluator.losses(model) == real[1]
    told = iter((math.nan,))
    with pytest.raises(RunError, match="not finite after 3 steps"):
        best(3, model)
    model.unload()


@dataclasses.dataclass
class Failing(LoRA):
    """Its second step does not work."""

    error: Exception | None = None

    def after_step(self, pairs: Sequence[AdapterPair]) -> None:
        if self.error is not None:
            raise self.error
        with torch.no_grad():
            pairs[0].b.fill_(math.nan)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 66 GiB")])
def test_a_run_that_fails_is_told_of_and_the_next_one_is_as_if_it_had_not_been(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setenv("FOLORA_Q_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, tiny_folder)
    lines: list[str] = []
    for name, before in (("alone", []), ("after", [Series("failing", [Failing(1e-2, error)])])):
        series = [*before, Series("LoRA, MLP only", [MLPOnlyLoRA(1e-2)])]
        run_plan(
            Plan(recipe, ["training.max_length=64", "evaluation.num_answers=2"], series, [0], 2, tmp_path / name),
            Silent(),
            lines.append,
        )
    alone, failed, after = lines
    assert ("not finite after 1 steps" if error is None else "out of memory") in failed
    assert alone.partition(": task ")[2].rpartition(",")[0] == after.partition(": task ")[2].rpartition(",")[0]
