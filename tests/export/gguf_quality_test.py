"""What a quantized file keeps of the tuning, against plain transformers and PEFT."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from folora_q.data.tokens import IGNORED
from folora_q.errors import RunError
from folora_q.export.gguf_quality import GgufQuality, TaskLosses, measure_gguf
from folora_q.export.merge import Merge, write_merged
from folora_q.export.texts import CheckTexts
from folora_q.export.verify import MergedModel
from folora_q.models.adapter_file import read_adapter
from folora_q.models.quantization import Quantization
from folora_q.models.weight_files import open_checkpoint
from tests.conftest import save_tiny_model
from tests.export.models import save_adapter
from tests.export.quantizer import save_quantizer
from tests.models.load_test import write_gguf

TEXTS = ["<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\nit is 3<|im_end|>\n", "general text, of no task"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    folder = tmp_path_factory.mktemp("merged")
    base = save_tiny_model(folder / "base")
    adapter = read_adapter(save_adapter(base, folder / "adapter", size=0.02))
    merge = Merge(open_checkpoint(base), [(adapter, 1.0)], "original", torch.float32, Quantization())
    write_merged(merge, folder / "merged")
    return MergedModel(merge, folder / "merged")


@pytest.fixture(scope="module")
def texts(merged: MergedModel) -> CheckTexts:
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    labels = [[IGNORED] * (len(ids[0]) - 10) + ids[0][-10:], [IGNORED] * len(ids[1])]
    return CheckTexts(ids, labels, "here")


@pytest.fixture(scope="module")
def files(merged: MergedModel) -> dict[str, Path]:
    """The merged model and its base in float32, and the merged model in Q5_0."""
    found = {name: merged.folder.with_name(f"{name}.gguf") for name in ("merged", "base", "quantized")}
    write_gguf(merged.folder, found["merged"])
    write_gguf(merged.merge.base.folder, found["base"])
    quantizer = save_quantizer(merged.folder.parent / "bin")
    subprocess.run([quantizer, found["merged"], found["quantized"], "Q4_K_M"], check=True)
    return found


def logits(model: PreTrainedModel | PeftModel, ids: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([one])).logits[0, :-1] for one in ids])


def test_losses_kl_and_update_are_those_of_the_models_as_transformers_loads_them(
    merged: MergedModel, texts: CheckTexts, files: dict[str, Path], tmp_path: Path
) -> None:
    done: list[int] = []
    found = measure_gguf(files["quantized"], merged, texts, torch.float32, done.append)
    shutil.copyfile(files["quantized"], tmp_path / "model.gguf")  # transformers would read config.json next to it
    file = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(merged.merge.base.folder, dtype=torch.float32)
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    bare = logits(base, texts.sequences)
    tuned = PeftModel.from_pretrained(base, merged.merge.adapters[0][0].folder).eval()
    trained, quantized = logits(tuned, texts.sequences), logits(file, texts.sequences)
    p, q = trained.log_softmax(-1), quantized.log_softmax(-1)
    assert found.tokens == len(p)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    ends = torch.arange(len(texts.sequences[0]) - 11, len(texts.sequences[0]) - 1)
    answers = torch.tensor(texts.sequences[0][-10:])
    expected = [float(-each.log_softmax(-1)[ends, answers].mean()) for each in (bare, trained, quantized)]
    assert found.task is not None and found.task.tokens == 10
    assert [found.task.base, found.task.trained, found.task.file] == pytest.approx(expected, rel=1e-4)
    weights = load_file(merged.folder / "model.safetensors")
    change = {name: weights[name] - state[name] for name in merged.merge.changed}
    found_change = {name: file.state_dict()[name] - state[name] for name in change}
    square = sum(float(each.square().sum()) for each in change.values())
    along = sum(float((found_change[name] * change[name]).sum()) for name in change)
    rest = sum(float((found_change[name] - change[name]).square().sum()) for name in change)
    assert found.update_kept == pytest.approx(along / square, rel=1e-3)
    assert found.update_noise == pytest.approx((rest / square) ** 0.5, rel=1e-3)
    assert 0.9 < found.update_kept < 1.1 and 0.05 < found.update_noise < 2
    assert sum(done) == 3


def test_the_merged_model_keeps_everything_and_the_base_nothing(
    merged: MergedModel, texts: CheckTexts, files: dict[str, Path]
) -> None:
    whole = measure_gguf(files["merged"], merged, texts, torch.float32)
    assert whole.update_kept == pytest.approx(1, abs=1e-4) and whole.update_noise < 1e-3 and whole.kl < 1e-8
    nothing = measure_gguf(files["base"], merged, texts, torch.float32)
    assert nothing.update_kept == pytest.approx(0, abs=1e-4) and nothing.update_noise == pytest.approx(1, abs=1e-3)
    assert nothing.task is not None and nothing.task.file == pytest.approx(nothing.task.base, rel=1e-5)
    assert nothing.kl > 1e-3


def test_what_transformers_cannot_read_is_said(merged: MergedModel, texts: CheckTexts, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(RunError, match="transformers cannot read broken.gguf"):
        measure_gguf(tmp_path / "broken.gguf", merged, texts, torch.float32)


def test_words() -> None:
    task = TaskLosses(base=2.5, trained=0.5, file=0.7, tokens=100)
    assert task.share == pytest.approx(0.9)
    quality = GgufQuality(0.0123, 0.97, 1200, task, 0.99, 2.0)
    assert quality.in_words("q4_k_m") == (
        "q4_k_m keeps 90.0% of what the task's training gained (task loss 0.7000, trained 0.5000, base 2.5000); KL "
        "from the trained model is 0.012 nats per token, and 97.0% of the most likely tokens are the same (1,200 "
        "tokens). A larger type keeps more: q6_k, q8_0"
    )
    for without in (None, TaskLosses(0.5, 0.6, 0.6, 100)):
        words = GgufQuality(0.0123, 0.97, 1200, without, 0.99, 2.0).in_words("q8_0")
        assert words.startswith("q8_0 has 99% of the update of the weights, and rounding of 2 times its norm; KL from")
    assert quality.to_dict()["task_share"] == pytest.approx(0.9)
