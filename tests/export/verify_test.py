"""A merge that is not the adapter is found out, by its numbers or by what it says; a right one is not accused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folora_q.errors import RunError
from folora_q.export.merge import Merge, write_merged
from folora_q.export.verify import CheckedWeights, MergedModel, check_outputs, check_weights
from folora_q.models.weight_files import INDEX, open_checkpoint
from tests.export.merge_test import merge_of
from tests.export.models import save_adapter, sharded_llama, sharded_qwen

TEXTS = [list(range(3, 40)), list(range(100, 160)), [5] * 20]
SQUARE = "model.layers.1.self_attn.q_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), size=0.02)


def merged(merge: Merge, folder: Path) -> MergedModel:
    write_merged(merge, folder)
    return MergedModel(merge, folder)


def sabotage(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace one weight of a merged folder."""
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name]).to(tensors[name].dtype).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("weights", ["original", "dequantized"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_merge_passes(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype, weights: str) -> None:
    merge = merge_of(base, (adapter, 1.0), weights=weights, dtype=dtype)
    model = merged(merge, tmp_path / "merged")
    changed = check_weights(model)
    found = check_outputs(model, TEXTS, changed)
    assert found.failures == []
    assert (changed.changed, found.tokens) == (14, sum(map(len, TEXTS)) - 3)
    assert found.merged.mean < 0.1 * found.base_difference.mean
    assert found.merged.kl < 1e-2 * found.base_difference.kl
    if dtype == torch.float32:
        assert found.rounding is None and found.merged.largest <= 1e-4 and found.merged.kl <= 1e-9


def test_an_update_that_is_small_for_its_dtype_is_not_taken_for_the_base(base: Path, tmp_path: Path) -> None:
    """As after a few steps: rounding explains the difference, and the merged model is nearer to the adapter."""
    found = {}
    for size in (0.0001, 0.002):
        adapter = save_adapter(base, tmp_path / f"adapter-{size}", size=size)
        model = merged(merge_of(base, (adapter, 1.0), dtype=torch.bfloat16), tmp_path / f"merged-{size}")
        found[size] = check_outputs(model, TEXTS, check_weights(model))
    assert 0.4 < found[0.002].noise_share < 0.6 and found[0.002].failures == []
    assert len(found[0.0001].failures) == 1 and "rounding to bfloat16 may hide the adapter" in found[0.0001].failures[0]


@pytest.mark.parametrize("size", [0.0005, 0.001])
def test_what_rounding_leaves_of_small_updates_is_measured(base: Path, tmp_path: Path, size: float) -> None:
    """A change of less than half the distance between two numbers is rounded away: no noise, but a smaller update."""
    adapter = save_adapter(base, tmp_path / "adapter", size=size)
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        merge = merge_of(base, (adapter, 1.0), weights="dequantized", dtype=dtype)
        model = merged(merge, tmp_path / str(dtype))
        checked = check_weights(model)
        tensors = {
            name: tensor for path in model.folder.glob("*.safetensors") for name, tensor in load_file(path).items()
        }
        stored = exact = 0.0
        for name in merge.changed:
            update = sum(share * delta.dense(torch.float64) for share, delta in merge.deltas(name))
            stored += float(((tensors[name].double() - merge.base_weight(name).double()) * update).sum())
            exact += float(update.square().sum())
        assert checked.kept == pytest.approx(stored / exact, rel=1e-3)
        kept[dtype] = checked.kept
        found = check_outputs(model, TEXTS, checked)
        assert not any("is not the adapter" in failure for failure in found.failures) and found.kept == checked.kept
    assert kept[torch.float32] == pytest.approx(1, abs=1e-3) and kept[torch.bfloat16] < 0.99


def test_a_right_merge_passes_where_memory_is_for_16_bits_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    for weights in ("original", "dequantized"):
        merge = merge_of(base, (adapter, 1.0), weights=weights)
        model = merged(merge, tmp_path / weights)
        assert check_outputs(model, TEXTS, check_weights(model), torch.bfloat16).failures == []
    folder = merged(merge_of(base, (adapter, 0.0)), tmp_path / "base").folder
    model = MergedModel(merge_of(base, (adapter, 1.0)), folder)
    assert check_outputs(model, TEXTS, CheckedWeights(0), torch.bfloat16).failures


def test_tied_embeddings_and_several_adapters_pass(tmp_path: Path) -> None:
    base = sharded_qwen(tmp_path)
    one, two = (save_adapter(base, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    merge = merge_of(base, (one, 0.5), (two, -1.5), dtype=torch.bfloat16)
    model = merged(merge, tmp_path / "merged")
    assert check_outputs(model, TEXTS, check_weights(model)).failures == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_off_by_a_hundredth_is_found(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = merged(merge_of(base, (adapter, 1.01), dtype=dtype), tmp_path / "merged").folder
    with pytest.raises(RunError, match=r"the merged model\.layers\.\S+ is not the base's plus the adapter's change"):
        check_weights(MergedModel(merge_of(base, (adapter, 1.0), dtype=dtype), folder))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module_left_out_is_found(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    merge = merge_of(base, (adapter, 1.0), dtype=dtype)
    model = merged(merge, tmp_path / "merged")
    sabotage(model.folder, SQUARE, lambda _: merge.base.read(SQUARE))
    with pytest.raises(RunError, match=f"the merged {SQUARE} "):
        check_weights(model)
    if dtype != torch.bfloat16:  # whose rounding says as much as one small module of fourteen: the numbers tell
        found = check_outputs(model, TEXTS, CheckedWeights(13))
        assert any("is not the adapter" in failure for failure in found.failures)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_that_were_swapped_are_found(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    merge = merge_of(base, (adapter, 1.0), dtype=dtype)
    model = merged(merge, tmp_path / "merged")
    [(_, delta)] = merge.deltas(SQUARE)
    swapped = merge.base.read(SQUARE).float() + delta.dense().T
    sabotage(model.folder, SQUARE, lambda _: swapped)
    with pytest.raises(RunError, match=f"the merged {SQUARE} "):
        check_weights(model)
    found = check_outputs(model, TEXTS, CheckedWeights(14))
    assert any("is not the adapter" in failure for failure in found.failures)


def test_the_base_under_another_name_is_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge = merge_of(base, (adapter, 1.0))
    folder = merged(merge_of(base, (adapter, 0.0)), tmp_path / "merged").folder
    with pytest.raises(RunError, match="is not the base's plus the adapter's change"):
        check_weights(MergedModel(merge, folder))
    found = check_outputs(MergedModel(merge, folder), TEXTS, CheckedWeights(0))
    assert any("could be the base" in failure for failure in found.failures)


def test_an_adapter_that_changes_nothing_is_told(base: Path, tmp_path: Path) -> None:
    idle = save_adapter(base, tmp_path / "idle", size=0.0)
    merge = merge_of(base, (idle, 1.0))
    model = merged(merge, tmp_path / "merged")
    with pytest.raises(RunError, match="it is unchanged from the base"):
        check_weights(model)
    assert any("could be the base" in failure for failure in check_outputs(model, TEXTS, CheckedWeights(0)).failures)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_should_be_the_base_s_and_is_not_is_found(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    merge = merge_of(base, (adapter, 1.0))
    model = merged(merge, tmp_path / "merged")

    def touch(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        weight.view(-1)[3] *= 1.02
        return weight

    sabotage(model.folder, name, touch)
    with pytest.raises(RunError, match=f"the merged {name} is not"):
        check_weights(model)


def test_a_weight_too_many_or_too_few_is_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge = merge_of(base, (adapter, 1.0))
    model = merged(merge, tmp_path / "merged")
    index = json.loads((model.folder / INDEX).read_text())
    shard = model.folder / index["weight_map"].pop("model.norm.weight")
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (model.folder / INDEX).write_text(json.dumps(index))
    assert "model.norm.weight" not in open_checkpoint(model.folder).tensors
    with pytest.raises(RunError, match=r"model\.norm\.weight is only in one of them"):
        check_weights(model)
