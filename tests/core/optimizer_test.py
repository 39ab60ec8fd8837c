"""Both update rules against dense float64 transcriptions, and as the optimizers that a trainer expects."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.linalg import eigh
from torch import nn

from folora_q.core import CovarianceSketch, GatedOptimizer, SpectralAdamW, SpectralGate
from folora_q.core.batched_gates import GateStack
from tests.core import dense

D, OUT, R = 20, 6, 4


def covariance(seed: int, d: int = D, rank: int = 5):
    generator = torch.Generator().manual_seed(seed)
    sketch = CovarianceSketch(d, rank, oversampling=d, dtype=torch.float64)
    sketch.update(torch.randn(200, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d))
    return sketch.covariance()


def gate(gate_lambda: float = 1.0, rank: int = 5) -> SpectralGate:
    return SpectralGate.from_covariances(
        covariance(0, rank=rank), covariance(1, rank=rank), ridge=0.1, utility_ridge=0.02, gate_lambda=gate_lambda
    )


class Adapter(nn.Module):
    """x -> B A x, twice, and a bias that has no gate."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.a, self.b, self.c, self.d = (
            nn.Parameter((torch.randn(*shape, generator=generator, dtype=torch.float64) / 4).to(dtype))
            for shape in ((R, D), (OUT, R), (R, D), (OUT, R))
        )
        self.bias = nn.Parameter(torch.zeros(OUT, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T @ self.b.T + x @ self.c.T @ self.d.T + self.bias

    def adapters(self, gate: SpectralGate) -> list:
        return [(self.a, self.b, gate), (self.c, self.d, gate)]


X = torch.randn(32, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.randn(32, OUT, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def backward(model: Adapter, step: int = 0) -> float:
    chosen = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:16]
    dtype = model.a.dtype
    model.zero_grad()
    loss = (model(X[chosen].to(dtype)) - Y[chosen].to(dtype)).square().mean()
    loss.backward()
    return loss.item()


def trained(optimizer_of, steps: int = 12, dtype: torch.dtype = torch.float32) -> Adapter:
    model = Adapter(dtype)
    optimizer = optimizer_of(model)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def adamw(model: Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)


def adamw_8bit(model: Adapter) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(model.parameters(), lr=0.02, min_8bit_size=16)


INNER = {
    "AdamW": adamw,
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW8bit": adamw_8bit,
}


@pytest.mark.parametrize("name", INNER)
def test_a_gate_of_ones_is_the_inner_optimizer_bit_for_bit(name: str) -> None:
    inner = INNER[name]
    try:
        expected = trained(inner)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes' optimizers do not run here: {error}")
    assert same(trained(lambda model: GatedOptimizer(inner(model), model.adapters(gate(0.0)))), expected)
    assert not same(trained(lambda model: GatedOptimizer(inner(model), model.adapters(gate(1.0)))), expected)


def test_a_step_is_the_dense_one() -> None:
    """A + (Adam's step) Pᵀ and B + (Adam's step) K, no row longer than Adam's; weight decay is not gated."""
    model, lr, decay = Adapter(torch.float64), 0.02, 0.01
    ours = gate()
    optimizer = GatedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay), model.adapters(ours), refresh_every=1
    )
    gamma, v = dense.quotients(covariance(0).dense().numpy(), covariance(1).dense().numpy(), 0.1, 0.02)
    p = dense.gate_matrix(v, dense.gate_values(gamma, 1.0))
    a, b = model.a.detach().numpy().copy(), model.b.detach().numpy().copy()
    adam_a, adam_b = dense.Adam(), dense.Adam()
    settings = {"ridge": 0.1, "utility_ridge": 0.02, "gate_lambda": 1.0, "floor": 0.0, "sharpness": 1.0}
    for step in range(3):
        backward(model, step)
        k = dense.rank_gate_matrix(a, covariance(0).dense().numpy(), covariance(1).dense().numpy(), settings)
        a = (1 - lr * decay) * a + dense.no_longer(-lr * adam_a.direction(model.a.grad.numpy()), p.T)
        b = (1 - lr * decay) * b + dense.no_longer(-lr * adam_b.direction(model.b.grad.numpy()), k)
        optimizer.step()
        assert np.allclose(model.a.detach().numpy(), a, atol=1e-6)
        assert np.allclose(model.b.detach().numpy(), b, atol=1e-6)


def test_each_factor_can_be_gated_alone_and_what_has_no_gate_is_the_inner_optimizers() -> None:
    plain = trained(adamw, steps=1)
    for gate_a, gate_b in ((True, False), (False, True), (False, False)):
        model = trained(
            lambda m, gate_a=gate_a, gate_b=gate_b: GatedOptimizer(adamw(m), m.adapters(gate()), gate_a, gate_b),
            steps=1,
        )
        assert torch.equal(model.a, plain.a) is not gate_a
        assert torch.equal(model.b, plain.b) is not gate_b
        assert torch.equal(model.bias, plain.bias)


def test_weight_decay_passes_no_gate() -> None:
    """Only the gradient's part of a step is gated: with no gradient at all, decay is AdamW's."""

    def decayed(optimizer_of) -> Adapter:
        model = Adapter()
        optimizer = optimizer_of(model)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        return model

    def gated(model: Adapter) -> GatedOptimizer:
        return GatedOptimizer(adamw(model), model.adapters(gate()))

    start, plain, ours = Adapter(), decayed(adamw), decayed(gated)
    assert same(plain, ours) and not same(start, ours)


def along(*direction: float):
    """The covariance of activations that vary little but in one direction."""
    sketch = CovarianceSketch(D, D, dtype=torch.float64)
    x = 0.01 * torch.randn(200, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[:, : len(direction)] += torch.tensor(direction, dtype=torch.float64)
    sketch.update(x)
    return sketch.covariance()


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_gated_row_is_no_longer_than_the_step_was(scale: float) -> None:
    """P is oblique: along its leading right singular vector a step would come out longer than it went in."""
    ours = SpectralGate.from_covariances(along(1.0, 0.0), along(1.0, 1.0), ridge=1e-4, utility_ridge=1e-4)
    _, stretch, direction = torch.linalg.svd(ours.dense())
    assert stretch[0] > 1.2
    model = Adapter()
    optimizer = GatedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.adapters(ours))
    before = model.a.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.a.grad[:] = scale * direction[0]
    optimizer.step()
    step = (model.a.detach() - before).norm(dim=1)
    assert torch.allclose(step, torch.full_like(step, scale), rtol=2e-1 if scale < 1e-3 else 1e-4)


def test_rows_in_shares_are_adam_in_spectral_coordinates_gated_direction_by_direction() -> None:
    """A frozen at √γᵢ vᵢ with plain Adam on B makes the ΔW of FoLoRA's lines for B: Ḡ = G V, step times √γ, back by Vᵀ.

    (2606.00132, section 3, for a ΔW = B̄ Vᵀ with the spectral coordinates B̄; the reference is dense and in float64.)
    """
    count, lr = 6, 0.05
    both = covariance(0, rank=D), covariance(1, rank=D)
    ours = SpectralGate.from_covariances(*both, ridge=0.1, utility_ridge=0.02, one_unit=True)
    rows = ours.gated_rows(count).double()
    b = nn.Parameter(torch.zeros(OUT, count, dtype=torch.float64))
    optimizer = torch.optim.AdamW([b], lr=lr, weight_decay=0.0, eps=1e-12)

    penalty, utility = (each.dense().numpy() for each in both)
    unit = np.trace(penalty) / D
    h = penalty + 0.1 * unit * np.eye(D)
    u = utility + 0.02 * np.trace(utility) / D * np.eye(D)
    gamma, v = eigh(u, h)
    gamma, v = gamma[::-1][:count], v[:, ::-1][:, :count]
    coordinates, adam = np.zeros((OUT, count)), dense.Adam(eps=1e-12)
    target = Y.T @ X / len(X)
    for _ in range(5):
        b.grad = (b.detach() @ rows - target) @ rows.T
        optimizer.step()
        gradient = coordinates @ v.T - target.numpy()  # of ΔW
        coordinates = coordinates - lr * adam.direction(gradient @ v) * np.sqrt(gamma)
        np.testing.assert_allclose((b.detach() @ rows).numpy(), coordinates @ v.T, rtol=1e-4, atol=1e-6)


def test_parameters_without_a_gradient_stay_and_nothing_breaks() -> None:
    model = Adapter()
    optimizer = GatedOptimizer(adamw(model), model.adapters(gate()))
    backward(model)
    model.c.grad = model.d.grad = None
    c, d = model.c.detach().clone(), model.d.detach().clone()
    optimizer.step()
    assert torch.equal(model.c, c) and torch.equal(model.d, d)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model = Adapter()
    calls: list[float] = []

    def closure() -> float:
        calls.append(backward(model))
        return calls[-1]

    for optimizer in (GatedOptimizer(adamw(model), model.adapters(gate())), SpectralAdamW(model.adapters(gate()))):
        calls.clear()
        assert optimizer.step(closure) == calls[0]
        assert len(calls) == 1


def test_the_rank_gate_is_solved_every_so_many_steps(monkeypatch) -> None:
    solved: list[int] = []
    original = GateStack.rank_gates
    monkeypatch.setattr(GateStack, "rank_gates", lambda self, a: solved.append(1) or original(self, a))
    trained(lambda m: GatedOptimizer(adamw(m), m.adapters(gate()), refresh_every=4), steps=9)
    assert len(solved) == 3  # both adapters together, at steps 0, 4 and 8
    with pytest.raises(ValueError, match="refresh_every"):
        GatedOptimizer(adamw(Adapter()), [], refresh_every=0)


def unsolvable(monkeypatch, calls_that_fail: set[int]) -> None:
    original, calls = GateStack.rank_gates, [0]

    def rank_gates(self: GateStack, a: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] in calls_that_fail:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(self, a)

    monkeypatch.setattr(GateStack, "rank_gates", rank_gates)


def test_where_the_rank_gate_cannot_be_solved_for_the_last_one_stays_and_failures_in_a_row_are_counted(
    monkeypatch, tmp_path
) -> None:
    unsolvable(monkeypatch, {2, 3, 5, 6, 7})
    model, told = Adapter(), []
    optimizer = GatedOptimizer(adamw(model), model.adapters(gate()), refresh_every=1)
    default = optimizer.on_failure
    optimizer.on_failure = lambda count, error: (told.append(count), default(count, error))
    gates = []
    for step in range(6):
        backward(model, step)
        optimizer.step()
        gates.append([k.clone() for k in optimizer.rank_gates])
    assert told == [1, 2, 1, 2] and optimizer.failures == 2
    assert all(torch.equal(one, other) for one, other in zip(gates[0], gates[2], strict=True))
    assert not torch.equal(gates[2][0], gates[3][0])
    again = GatedOptimizer(adamw(model), model.adapters(gate()), refresh_every=1)
    again.load_state_dict(optimizer.state_dict())
    assert again.failures == 2
    backward(model, 6)
    with pytest.raises(torch.linalg.LinAlgError, match="failed to converge"):
        again.step()


def test_without_a_first_rank_gate_there_is_no_step(monkeypatch) -> None:
    unsolvable(monkeypatch, {1})
    model = Adapter()
    before = copy.deepcopy(model)
    backward(model)
    with pytest.raises(torch.linalg.LinAlgError):
        GatedOptimizer(adamw(model), model.adapters(gate())).step()
    assert same(model, before)


OURS = {
    "gated": lambda m: GatedOptimizer(adamw(m), m.adapters(gate()), refresh_every=4),
    "spectral": lambda m: SpectralAdamW(m.adapters(gate()), lr=0.02, weight_decay=0.01, others=[m.bias]),
}


@pytest.mark.parametrize("name", OURS)
def test_a_resumed_run_goes_on_bit_for_bit_between_two_refreshes(name: str, tmp_path) -> None:
    expected = trained(OURS[name], steps=11)
    model = Adapter()
    optimizer = OURS[name](model)
    for step in range(6):
        backward(model, step)
        optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model = Adapter()
    model.load_state_dict(saved["model"])
    optimizer = OURS[name](model)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(6, 11):
        backward(model, step)
        optimizer.step()
    assert same(model, expected)


@pytest.mark.parametrize("name", OURS)
def test_schedulers_and_accelerate_work_unchanged(name: str) -> None:
    model = Adapter()
    optimizer = OURS[name](model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    backward(model)
    prepared.step()
    scheduler.step()
    after_one = copy.deepcopy(model)
    backward(model, 1)
    prepared.step()
    assert same(model, after_one), "at a learning rate of zero nothing moves"
    prepared.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_wrapper_and_inner_optimizer_share_groups_and_state() -> None:
    model = Adapter()
    inner = adamw(model)
    optimizer = GatedOptimizer(inner, model.adapters(gate()))
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5
    backward(model)
    optimizer.step()
    assert optimizer.state is inner.state
    assert len(optimizer.state) == 5
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra]})
    assert inner.param_groups[1]["params"][0] is extra


@pytest.mark.parametrize("name", OURS)
def test_it_learns_and_does_so_the_same_way_twice(name: str) -> None:
    model = trained(OURS[name], steps=60)
    assert same(model, trained(OURS[name], steps=60))
    assert backward(model) < 0.8 * backward(Adapter())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_spectral_adam_is_the_papers_five_lines(weight_decay: float) -> None:
    full = gate(rank=D)  # the whole basis, as in the paper
    model = Adapter(torch.float64)
    optimizer = SpectralAdamW(model.adapters(full), lr=0.02, weight_decay=weight_decay)
    sigma_p, sigma_t = covariance(0, rank=D).dense().numpy(), covariance(1, rank=D).dense().numpy()
    gamma, v = dense.quotients(sigma_p, sigma_t, 0.1, 0.02)
    reference = dense.SpectralAdam(v, dense.gate_values(gamma, 1.0), 0.02, weight_decay)
    a = model.a.detach().numpy().copy()
    for step in range(5):
        backward(model, step)
        a = reference.step(a, model.a.grad.numpy())
        optimizer.step()
        assert np.allclose(model.a.detach().numpy(), a, atol=2e-5)


def test_spectral_adam_leaves_b_and_the_rest_to_adamw() -> None:
    model, plain = Adapter(), Adapter()
    optimizer = SpectralAdamW(model.adapters(gate()), lr=0.02, weight_decay=0.1, others=[model.bias])
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1)
    for step in range(5):
        backward(model, step)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for name in ("b", "d", "bias"):
        assert torch.allclose(getattr(model, name), getattr(plain, name), atol=1e-6)
    assert not torch.allclose(model.a, plain.a, atol=1e-3)


def test_the_moments_of_a_are_as_narrow_as_the_basis() -> None:
    model = Adapter()
    optimizer = SpectralAdamW(model.adapters(gate()), others=[model.bias])
    backward(model)
    optimizer.step()
    assert optimizer.state[model.a]["exp_avg"].shape == (R, gate().basis.shape[1]) == (R, 10)


def test_outside_the_basis_a_step_is_frozen_or_gated() -> None:
    p0 = gate().basis.double()

    def outside(complement: str, gate_lambda: float = 1.0) -> torch.Tensor:
        model, start = Adapter(), Adapter()
        optimizer = SpectralAdamW(model.adapters(gate(gate_lambda)), lr=0.02, complement=complement)
        backward(model)
        optimizer.step()
        step = (model.a - start.a).detach().double()
        return step - step @ p0 @ p0.T

    assert float(outside("frozen").norm()) < 1e-6
    gated, weaker = outside("gated"), outside("gated", 4.0)
    assert float(gated.norm()) > 1e-3
    ratio = gate(4.0).complement_value / gate(1.0).complement_value
    assert torch.allclose(weaker, gated * ratio, atol=1e-6)


def test_the_gated_complement_is_adam_with_one_second_moment_a_row() -> None:
    ours, model, lr = gate(), Adapter(torch.float64), 0.02
    optimizer = SpectralAdamW(model.adapters(ours), lr=lr, complement="gated")
    q = np.linalg.svd(ours.basis.double().numpy())[0][:, ours.basis.shape[1] :]  # what the basis leaves out
    h = dense.normalized(covariance(0).dense().numpy()) + 0.1 * np.eye(D)
    reference = dense.ComplementAdam(q, float(q[:, 0] @ h @ q[:, 0]), ours.complement_value, lr)
    for step in range(5):
        backward(model, step)
        before = model.a.detach().numpy().copy()
        expected = reference.step(model.a.grad.numpy())
        optimizer.step()
        moved = (model.a.detach().numpy() - before) @ q @ q.T
        assert np.allclose(moved, expected, atol=1e-6 * np.abs(expected).max() + 1e-7), step
        assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize(
    "changes", [{"complement": "free"}, {"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}]
)
def test_bad_arguments_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError):
        SpectralAdamW(Adapter().adapters(gate()), **changes)
