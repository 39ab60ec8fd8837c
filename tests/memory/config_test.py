"""Where config.json comes from."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest

from folora_q.errors import UserError
from folora_q.memory.config import DEMO_MODEL, config_here, read_config
from folora_q.memory.shapes import shape_of
from folora_q.memory.shipped_models import shipped_model
from tests.memory.recipes import SMALL_LLAMA


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA), encoding="utf-8")
    assert read_config(str(tmp_path)) == SMALL_LLAMA


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}', '{"text_config": {"hidden_size": 3}}'])
def test_a_config_that_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(str(tmp_path))


def test_the_demos_model_is_known_without_its_file() -> None:
    from folora_q.models import demo

    assert demo.DEMO_MODEL == DEMO_MODEL
    assert shape_of(read_config(DEMO_MODEL)).parameters == 134_515_008
    assert config_here(DEMO_MODEL) == read_config(DEMO_MODEL)


def test_a_hub_id_that_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL_LLAMA), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert read_config("someone/model") == SMALL_LLAMA


QWEN = "Qwen/Qwen2.5-7B-Instruct"
CUT = json.dumps(SMALL_LLAMA | {"vocab_size": 77})


def test_the_cache_comes_before_the_hub_and_the_hub_before_the_shipped_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_text(CUT, encoding="utf-8")
    shipped = shipped_model(QWEN)
    assert shipped is not None
    assert read_config(QWEN) == shipped.config  # no hub may be asked (tests/conftest.py)
    assert config_here(QWEN) is None
    with pytest.raises(UserError, match=f"{QWEN} is not in the hub's cache, and HF_HUB_OFFLINE forbids"):
        read_config(QWEN, use_shipped=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(file))
    assert read_config(QWEN)["vocab_size"] == 77
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert read_config(QWEN)["vocab_size"] == 77
    assert read_config(str(tmp_path))["vocab_size"] == 77


def test_nobody_can_change_the_shipped_numbers() -> None:
    read_config(QWEN)["vocab_size"] = 77
    assert read_config(QWEN)["vocab_size"] == 152_064


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = Event()

    class Hanging:
        def head(self, *_: object, **__: object) -> None:
            let_go.wait(60)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Hanging)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("folora_q.memory.config.MAX_SECONDS_TO_ANSWER", 0.01)
    try:
        assert read_config(QWEN)["vocab_size"] == 152_064
        with pytest.raises(UserError, match="nobody/nothing is not in the hub's cache, and the hub cannot be reached"):
            read_config("nobody/nothing")
    finally:
        let_go.set()


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match="the model nobody/nothing is not in the hub's cache") as caught:
        read_config("nobody/nothing")
    assert "name a local folder" in str(caught.value.hint)


def save_gguf(path: Path, architecture: str = "llama", head: bool = False) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list([f"word{number}" for number in range(300)])
    writer.add_token_scores([0.0] * 300)
    writer.add_token_merges(["a b", "c d"])
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", np.zeros((300, 128), dtype=np.float16))
    if head:
        writer.add_tensor("output.weight", np.zeros((300, 128), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("head", [False, True])
def test_a_gguf_file(head: bool, tmp_path: Path) -> None:
    found = read_config(str(save_gguf(tmp_path / "small.gguf", head=head)))
    assert found == SMALL_LLAMA | {"tie_word_embeddings": not head}


def test_a_gguf_file_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the architecture mamba"):
        read_config(str(save_gguf(tmp_path / "small.gguf", "mamba")))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x01\x00\x00\x00" + bytes(16), b"a text" * 10])
def test_a_file_that_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the header of"):
        read_config(str(path))


def test_a_gguf_file_that_is_cut(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "small.gguf")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read the header of"):
        read_config(str(path))
