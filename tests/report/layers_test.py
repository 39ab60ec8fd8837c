"""Names of modules, taken as they come, and grids of what is known of them."""

from __future__ import annotations

import math

import pytest

from folora_q.errors import UserError
from folora_q.report.gates import find_gates, mean_value, passing, shared_by
from folora_q.report.layers import LayerPlace, Scale, grid_of, joint_name, place_of, scale_of, short_names
from folora_q.runs.results import GateResult
from tests.report.run_folder import Shape, gates


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.mlp.down_proj", LayerPlace("model.layers", 11, "mlp.down_proj")),
        ("model.layers.3.mlp.experts.17.up_proj", LayerPlace("model.layers", 3, "mlp.experts.*.up_proj")),
        ("lm_head", LayerPlace("", None, "lm_head")),
        ("blocks.4", LayerPlace("blocks", 4, "blocks")),
        ("4", LayerPlace("", 4, "")),
        ("", LayerPlace("", None, "")),
        ("h." + "9" * 5000, LayerPlace("", None, "h." + "9" * 5000)),
        ("layers.٣.q", LayerPlace("", None, "layers.٣.q")),
        ("<script>.1.$x$", LayerPlace("<script>", 1, "$x$")),
    ],
)
def test_a_name_is_parsed_without_knowing_the_model(name: str, place: LayerPlace) -> None:
    assert place_of(name) == place


def test_kinds_are_as_short_as_they_can_be() -> None:
    names = ["m.layers.0.attn.q_proj", "m.layers.1.attn.q_proj", "m.layers.0.cross.q_proj", "m.layers.0.mlp.up", "head"]
    assert list(short_names(names).values()) == ["attn.q_proj", "cross.q_proj", "up", "head"]
    twins = short_names(["enc.layers.0.attn.q", "dec.layers.0.attn.q"])
    assert list(twins.values()) == ["enc.layers.attn.q", "dec.layers.attn.q"]
    assert joint_name(["q_proj", "k_proj", "v_proj"]) == "q/k/v_proj"
    assert joint_name(["w1", "w3"]) == "w1/w3"
    assert joint_name(["_proj", "q_proj"]) == "_proj/q_proj"


def test_a_grid_has_kinds_and_layers_and_a_column_for_the_rest() -> None:
    grid = grid_of(
        [
            (["m.0.q", "m.0.k"], 1.0),
            (["m.7.q", "m.7.k"], 2.0),
            (["m.7.up"], 3.0),
            (["head"], 4.0),
            (["m.7.down"], math.nan),
            ([], 5.0),
        ]
    )
    assert grid.rows == ["q/k", "up", "head"]
    assert grid.columns == [0, 7, None]
    assert grid.cells == [[1.0, 2.0, None], [None, 3.0, None], [None, None, 4.0]]


def test_experts_are_averaged() -> None:
    grid = grid_of((([f"m.0.experts.{i}.up"]), float(i)) for i in range(5))
    assert grid.rows == ["up"] and grid.cells == [[2.0]]


def test_scales() -> None:
    assert [scale_of([1, 10, 100], True).share(x) for x in (0.0, 1, 10, 100, 1e9)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert scale_of([1e-30, 1.0], True).low == pytest.approx(1e-5)
    assert scale_of([2.0, 4.0], False) == Scale(0.0, 4.0, False)
    assert [scale_of(values, log).share(0.0) for values in ([], [0.0]) for log in (True, False)] == [0.5] * 4


def gate(modules: list[str], quotients: list[float], dim: int = 4, complement: float = 0.1) -> GateResult:
    values = [quotient / (quotient + 1) for quotient in quotients]
    return GateResult(modules, dim, 1.0, quotients, values, complement, complement / (complement + 1))


def test_what_passes_is_counted_over_all_directions() -> None:
    found = [gate(["a.0.q", "a.0.k"], [3.0, 1.5, 0.5]), gate(["a.0.o"], [2.0], complement=9.0)]
    assert passing(found) == (2 + 4, 8)
    first = (0.75 + 0.6 + 1 / 3 + 1 / 11) / 4
    second = (2 / 3 + 3 * 0.9) / 4
    assert found[0].mean_value == pytest.approx(first)
    assert mean_value(found) == pytest.approx((first + second) / 2)
    assert mean_value([*found, gate(["a.0.x"], [], dim=0)]) == mean_value(found)
    assert shared_by(found) == ["q/k"]


def test_a_gate_is_found_by_the_end_of_a_name_or_a_pattern() -> None:
    found = gates(Shape(layers=3))
    for asked in ("model.layers.1.self_attn.k_proj", "1.self_attn.k_proj", "*.1.*.k_proj", "layers.1.*.k_proj"):
        assert [gate.modules[1] for gate in find_gates(found, asked)] == ["model.layers.1.self_attn.k_proj"], asked
    assert len(find_gates(found, "k_proj")) == 3
    assert find_gates(found, "layers.?.mlp.up_proj") == find_gates(found, "layers.*.mlp.gate_proj")


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ("donw_proj", "no gated module is called donw_proj", "did you mean down_proj"),
        ("layers.1.mlp.donw_proj", "no gated module", "did you mean layers.1.mlp.down_proj"),
        ("zzz", "no gated module is called zzz", "leave out --module"),
        ("k_proj", "k_proj matches 6 gates", "--module model.layers.3.self_attn.k_proj"),
    ],
)
def test_a_gate_that_is_not_found_is_answered_with_near_ones(asked: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        find_gates(gates(Shape(layers=6)), asked)
    assert message in caught.value.message and hint in (caught.value.hint or "")
