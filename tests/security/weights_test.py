"""Weights are safetensors; pickles only with --allow-pickle, and then tensors alone; all of it from its own folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from folora_q.errors import UserError
from folora_q.models.hardware import choose_hardware
from folora_q.models.load import load_model, load_unquantized
from folora_q.models.tokenizer import local_or_hub
from folora_q.models.trust import CONFIG, NOTHING, SAFE, SAFE_INDEX, Trust, is_inside, shards_of
from folora_q.models.weight_files import open_checkpoint
from folora_q.recipe.schema import ModelSection
from folora_q.targets.find import find_target
from folora_q.targets.load import fetched
from tests.conftest import write_recipe
from tests.security.hostile import Touch, edit_json, pickled_adapter, pickled_model, run

FLAG = "--allow-pickle"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def commands(model: Path, adapter: Path) -> list[tuple[object, ...]]:
    """What loads a base's weights."""
    return [
        ("train", write_recipe(model.parent, model)),
        ("chat", model, "--prompt", "hi"),
        ("chat", model, "--prompt", "hi", "--bits", "16"),
        ("eval", model, "--against", model),
        ("merge", adapter, "--base-model", model),
    ]


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "python"])
def test_a_pickled_base_is_refused_and_not_opened(
    raw: bool, tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    model = pickled_model(tiny_folder, tmp_path / "model", mark, raw)
    for command in commands(model, tiny_adapter):
        assert run(*command) == 2, command
        said = capfd.readouterr().err
        assert f"the weights are a pickle, which can hold code: {model}/pytorch_model.bin" in said, command
        assert f"convert them to safetensors, or, if you trust who made them, add {FLAG}" in said
    assert not mark.exists() and not (tmp_path / "run").exists() and not (tmp_path / "adapter-merged").exists()


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "python"])
def test_a_pickled_base_with_more_than_tensors_is_refused_although_allowed(
    raw: bool, tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    model = pickled_model(tiny_folder, tmp_path / "model", mark, raw)
    for command in commands(model, tiny_adapter):
        assert run(*command, FLAG) == 2, command
        assert "not loaded" in capfd.readouterr().err, command
    assert not mark.exists()


def test_a_pickle_of_tensors_is_the_same_model_where_it_is_allowed(
    tiny_folder: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    model = pickled_model(tiny_folder, tmp_path / "model")
    found, _ = load_unquantized(
        ModelSection(model_name_or_path=str(model)), choose_hardware("float32"), Trust(pickle=True)
    )
    expected = load_file(tiny_folder / SAFE)
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in expected.items())
    for folder, base, flags in ((tmp_path / "one", tiny_folder, []), (tmp_path / "two", model, [FLAG])):
        assert run("merge", tiny_adapter, "--base-model", base, "--output", folder, *flags) == 0
    merged = [load_file(tmp_path / name / SAFE) for name in ("one", "two")]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_sharded_pickle_is_merged_too(tiny_folder: Path, tmp_path: Path) -> None:
    model = pickled_model(tiny_folder, tmp_path / "model")
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    (model / "pytorch_model.bin").unlink()
    places = {name: f"part-{number % 2}.bin" for number, name in enumerate(weights)}
    for shard in set(places.values()):
        torch.save({name: weights[name] for name in weights if places[name] == shard}, model / shard)
    edit_json(model / "pytorch_model.bin.index.json", weight_map=places, metadata={})
    with pytest.raises(UserError, match="a pickle, which can hold code"):
        open_checkpoint(model)
    checkpoint = open_checkpoint(model, Trust(pickle=True))
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.read(name), weight) for name, weight in weights.items())
    edit_json(model / "pytorch_model.bin.index.json", weight_map=dict.fromkeys(weights, "../part-0.bin"))
    with pytest.raises(UserError, match=r"names '\.\./part-0\.bin' as a shard"):
        open_checkpoint(model, Trust(pickle=True))


def test_a_pickled_adapter_needs_the_flag_and_may_hold_tensors_alone(
    tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    good = pickled_adapter(tiny_adapter, tmp_path / "good")
    bad = pickled_adapter(tiny_adapter, tmp_path / "bad", mark)
    for adapter in (good, bad):
        for command in (("chat", adapter, "--prompt", "hi"), ("eval", adapter), ("merge", adapter)):
            assert run(*command) == 2, command
            assert f"the weights are a pickle, which can hold code: {adapter}" in capfd.readouterr().err
    for command in (("chat", bad, "--prompt", "hi"), ("eval", bad), ("merge", bad)):
        assert run(*command, FLAG) == 2, command
        assert "the adapter" in (said := capfd.readouterr().err) or "not loaded" in said
    assert not mark.exists()
    assert run("chat", good, "--prompt", "hi", "--max-new-tokens", "4", FLAG) == 0
    for source, flags in ((tiny_adapter, []), (good, [FLAG])):
        assert run("merge", source, "--output", tmp_path / source.name, *flags, "--overwrite", "--no-verify") == 0
        capfd.readouterr()


def test_other_peoples_files_beside_the_weights_are_no_reason(tiny_folder: Path, tmp_path: Path, mark: Path) -> None:
    """training_args.bin and pytorch_model.bin lie beside safetensors everywhere; nobody opens them."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    load_model(ModelSection(model_name_or_path=str(folder)), choose_hardware("float32"))
    assert not mark.exists()


def test_a_pickle_by_the_name_of_safetensors_is_refused(
    tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / SAFE).write_bytes(pickle.dumps(Touch(mark)))
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Touch(mark)))
    both = [*commands(model, tiny_adapter), ("chat", adapter, "--prompt", "hi"), ("merge", adapter), ("eval", adapter)]
    for command in both:
        for flags in ([], [FLAG]):
            assert run(*command, *flags) == 2, command
            said = capfd.readouterr().err
            assert "damaged" in said and "Traceback" not in said, command
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not mark.exists()


# files outside of the folder


def indexed(tiny: Path, folder: Path, shard: str) -> Path:
    """The tiny model, whose index names this as its only shard."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / SAFE)
    (folder / SAFE).unlink()
    edit_json(folder / SAFE_INDEX, weight_map=dict.fromkeys(weights, shard), metadata={})
    return folder


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{root}/outside.safetensors", "model/pytorch.bin", ""])
def test_an_index_names_safetensors_of_its_own_folder(
    shard: str, tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, capfd
) -> None:
    shutil.copyfile(tiny_folder / SAFE, tmp_path / "outside.safetensors")
    model = indexed(tiny_folder, tmp_path / "model", shard.format(root=tmp_path))
    for command in commands(model, tiny_adapter):
        assert run(*command) == 2, command
        assert "as a shard, which is not a .safetensors file in its folder" in capfd.readouterr().err, command


def test_an_index_that_sends_safetensors_to_a_pickle_is_refused_although_pickles_are_allowed(
    tiny_folder: Path, tmp_path: Path, mark: Path
) -> None:
    """transformers goes by the shard's ending, whatever `use_safetensors` says."""
    model = indexed(tiny_folder, tmp_path / "model", "shard.bin")
    torch.save(Touch(mark), model / "shard.bin")
    for trust in (NOTHING, Trust(pickle=True)):
        with pytest.raises(UserError, match=r"not a \.safetensors file"):
            load_model(ModelSection(model_name_or_path=str(model)), choose_hardware("float32"), trust=trust)
    assert not mark.exists()


@pytest.mark.parametrize("named", ["adapter_model.bin", "../outside.safetensors", "/outside.safetensors", 3, [1]])
def test_a_configuration_names_safetensors_of_its_own_folder(named: object, tiny_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    torch.save(load_file(model / SAFE), model / "adapter_model.bin")
    edit_json(model / CONFIG, transformers_weights=named)
    with pytest.raises(UserError, match="names weights that are not safetensors in the same folder"):
        load_model(ModelSection(model_name_or_path=str(model)), choose_hardware("float32"))


def test_an_adapter_in_a_models_folder_is_not_put_on_it(tiny_folder: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    """transformers does that by itself, and reads a pickled one too."""
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    shutil.copyfile(tiny_adapter / "adapter_config.json", model / "adapter_config.json")
    with pytest.raises(UserError, match="holds a model and an adapter on it"):
        load_model(ModelSection(model_name_or_path=str(model)), choose_hardware("float32"))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("part/a.safetensors", True),
        ("..a/b..", True),
        ("a/../../b", False),
        ("/etc/passwd", False),
        ("..\\..\\b", False),
        ("C:\\b", False),
        ("C:b", False),
        ("\\\\host\\share\\b", False),
        ("a\0b", False),
        ("", False),
    ],
)
def test_names_that_stay_in_a_folder(name: str, inside: bool) -> None:
    assert is_inside(name) is inside


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_the_users_to_know(content: str, tmp_path: Path) -> None:
    (tmp_path / SAFE_INDEX).write_text(content)
    with pytest.raises(UserError, match=SAFE_INDEX):
        shards_of(tmp_path / SAFE_INDEX)


def test_what_lies_beside_a_gguf_file_is_not_read(
    tiny_folder: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads end up in one folder: an adapter or a tokenizer there is another model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter_config.json").write_text("{}")
    seen: list[list[str]] = []

    def look(pretrained_model_name_or_path: str, **settings: object) -> None:
        assert settings["trust_remote_code"] is False
        seen.append([path.name for path in Path(pretrained_model_name_or_path).iterdir()])
        raise OSError("enough")

    for loader in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", look)
    with pytest.raises(UserError, match="enough"):
        local_or_hub(str(tmp_path / "a.gguf"))
    assert seen == [["a.gguf"]]


# a hub's, as its client keeps them


def on_the_hub(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A folder in the place where the hub's client keeps what it has downloaded; the hub itself is not asked."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_models_files_on_a_hub_are_looked_through_too(
    tiny_folder: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    good = on_the_hub(tiny_folder, "somebody/good", monkeypatch, tmp_path / "hub")
    loaded = load_model(ModelSection(model_name_or_path="somebody/good"), choose_hardware("float32"))
    assert loaded.name == "somebody/good" and loaded.revision == COMMIT
    pickled = pickled_model(tiny_folder, tmp_path / "pickled", mark)
    on_the_hub(pickled, "somebody/pickled", monkeypatch, tmp_path / "hub")
    on_the_hub(indexed(tiny_folder, tmp_path / "out", "../a.safetensors"), "a/out", monkeypatch, tmp_path / "hub")
    for name, message in (("somebody/pickled", "a pickle"), ("a/out", "as a shard")):
        assert run("chat", name, "--prompt", "hi") == 2
        assert message in capfd.readouterr().err
    assert good.exists() and not mark.exists()


def test_an_adapter_on_a_hub_is_loaded_as_from_a_folder(
    tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    on_the_hub(tiny_folder, "somebody/base", monkeypatch, tmp_path / "hub")
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="somebody/base")
    on_the_hub(adapter, "somebody/adapter", monkeypatch, tmp_path / "hub")
    on_the_hub(pickled_adapter(adapter, tmp_path / "p", mark), "somebody/pickled", monkeypatch, tmp_path / "hub")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tiny_folder))
    on_the_hub(adapter, "somebody/local", monkeypatch, tmp_path / "hub")
    assert fetched(find_target("somebody/adapter")).kind == "adapter on somebody/base"
    assert run("chat", "somebody/adapter", "--base", "--prompt", "hi", "--max-new-tokens", "4") == 0
    assert "base\n" in capfd.readouterr().out
    for name, message in (
        ("somebody/pickled", "the weights are a pickle"),
        ("somebody/local", "names a file of this machine as its base"),
    ):
        assert run("chat", name, "--prompt", "hi") == 2
        assert message in capfd.readouterr().err
    assert not mark.exists()
