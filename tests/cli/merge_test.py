"""`folora-q merge` as a person types it: a run, a foreign adapter, several; what it prints, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.cli.app import main
from folora_q.export.merge import REPORT
from folora_q.runs.result_files import read_evaluation
from folora_q.workflows import merge as merging
from folora_q.workflows.merge import UNVERIFIED
from tests.export.gguf_test import CONVERTER
from tests.export.go import parse_modelfile
from tests.export.models import save_adapter, sharded_llama
from tests.export.quantizer import save_quantizer
from tests.forked import forked, wait_until


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def report_of(folder: Path) -> dict:
    return json.loads((folder / REPORT).read_text("utf-8"))


@pytest.fixture
def trained(recipe_file: Path, tmp_path: Path) -> Path:
    quick = ["evaluation.metric=none", "gate.enabled=false", "training.learning_rate=0.1"]
    assert run("train", recipe_file, *quick) == 0
    return tmp_path / "run"


def test_a_run_is_merged_into_what_it_was_trained_on_and_proven(trained: Path, tiny_folder: Path, capfd) -> None:
    capfd.readouterr()
    assert run("merge", trained) == 0
    text, talk = capfd.readouterr()
    merged = trained / "merged"
    report = report_of(merged)
    assert report["verified"] is True and report["base_weights"] == "dequantized" and report["dtype"] == "bfloat16"
    assert report["weights"] == 14
    assert "Is it the adapter? Yes, on" in text and f"{report['merged']['mean']:.3g}" in text
    assert "14 weights changed, each to the nearest number of its dtype" in text and str(merged) in text
    assert "held-out rows of the task, held-out text sampled from the base, general text" in talk
    card = (merged / "README.md").read_text("utf-8")
    assert "Yes. Every weight is the nearest number to the sum." in card and f"{report['merged']['mean']:.3g}" in card
    assert not (merged / UNVERIFIED).exists()
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "dtype": "float32",
    }
    assert run("merge", trained) == 2
    assert f"{merged} already exists" in capfd.readouterr().err
    assert run("merge", trained, "--overwrite", "--no-verify", "--base", "original", "--dtype", "float32") == 0
    assert report_of(merged)["verified"] is None and "not verified" in capfd.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, trained / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(merged)("say 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
        assert torch.allclose(found, tuned(ids).logits, atol=1e-4)


def test_the_comparison_takes_the_memory_that_there_is(trained: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(merging, "FLOAT32_MEMORY", 1e12)
    assert run("merge", trained) == 0
    assert "comparing what it says, in bfloat16 (float32 needs" in capfd.readouterr().err
    assert report_of(trained / "merged")["verified"] is True


def test_adapters_trained_elsewhere_are_merged_with_weights(tmp_path: Path, capfd) -> None:
    base = sharded_llama(tmp_path)
    one, two = (save_adapter(base, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert run("merge", one, "--base", "original") == 0
    assert report_of(tmp_path / "0-merged")["verified"] is True
    assert "general text" in capfd.readouterr().err
    output = tmp_path / "both"
    assert run("merge", one, two, "--weight", 0.5, "--weight", -1, "--output", output) == 0
    assert [adapter["weight"] for adapter in report_of(output)["adapters"]] == [0.5, -1.0]
    (tmp_path / ".x.abc").mkdir()
    assert run("merge", one, two, "--weight", 0.5, "--output", tmp_path / "x") == 2
    assert "2 adapters and 1 weights" in capfd.readouterr().err
    assert run("merge", one, "--output", tmp_path / "x", "--no-verify") == 0
    assert f"{tmp_path / '.x.abc'} is left from a merge that was killed" in capfd.readouterr().err


def test_what_is_no_adapter_and_a_base_that_is_gone_are_told(trained: Path, tmp_path: Path, capfd) -> None:
    for source, message in (("", "is neither a run folder nor an adapter"), ("gone", "there is no run or adapter at")):
        assert run("merge", tmp_path / source) == 2
        assert message in capfd.readouterr().err
    config = trained / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(json.loads(config.read_text())["base_model_name_or_path"], "no/such"))
    assert run("merge", trained) == 2
    assert "cannot find the base model no/such" in capfd.readouterr().err
    assert not (trained / "merged").exists()


def test_a_merge_that_is_not_the_adapter_is_marked_and_fails(tmp_path: Path, capfd, monkeypatch) -> None:
    base = sharded_llama(tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    write = merging.write_merged

    def sabotaged(merge, *arguments):
        wrong = [(adapter, share * 1.01) for adapter, share in merge.adapters]
        write(type(merge)(merge.base, wrong, merge.weights, merge.dtype, merge.quantization), *arguments)

    monkeypatch.setattr(merging, "write_merged", sabotaged)
    assert run("merge", adapter) == 1
    talk = capfd.readouterr().err
    merged = tmp_path / "adapter-merged"
    assert "is not the base's plus the adapter's change" in talk and f"{merged} is marked UNVERIFIED" in talk
    assert report_of(merged)["verified"] is False
    assert "is not the base's plus" in (merged / UNVERIFIED).read_text()
    assert "Do not use this model" in (merged / "README.md").read_text()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    base = sharded_llama(tmp_path)
    adapter = save_adapter(base, tmp_path / "adapter")
    output = tmp_path / "output.txt"
    with forked(["merge", adapter], output) as process:
        wait_until(lambda: output.exists() and "[done] merging" in output.read_text("utf-8"), process, output)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        said = output.read_text("utf-8")
        assert process.exitcode == 130 and "error: interrupted" in said, said
    assert not (tmp_path / "adapter-merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".adapter-merged")]


@pytest.fixture
def llama_cpp(tmp_path: Path) -> list[object]:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER, encoding="utf-8")
    return ["--converter", script, "--llama-quantize", save_quantizer(tmp_path / "bin")]


def test_a_k_quant_is_written_measured_and_ready_for_ollama(trained: Path, llama_cpp: list[object], capfd) -> None:
    capfd.readouterr()
    assert run("merge", trained, "--dtype", "float16", "--gguf", "q4_k_m", *llama_cpp) == 0
    text, talk = capfd.readouterr()
    path = trained / "merged-q4_k_m.gguf"
    [written] = report_of(trained / "merged")["gguf"]
    assert (written["file"], written["type"], written["size"]) == (path.name, "q4_k_m", path.stat().st_size)
    assert written["compared"] == written["tensors"] == 22 and written["types"] == {"Q5_0": 16, "F32": 6}
    quality = written["quality"]
    assert quality["task"]["tokens"] == 40, "of four held-out rows the completions and their end"
    evaluation = read_evaluation(trained / "evaluation.json")
    loss = evaluation.text("task").loss
    assert quality["task"]["base"] == pytest.approx(loss.base.value, rel=1e-3)
    assert quality["task"]["trained"] == pytest.approx(loss.tuned.value, rel=1e-3)
    assert quality["task_share"] > 0.8 and 0.8 < quality["update_kept"] < 1.2 and 0 < quality["kl"] < 0.1
    assert f"q4_k_m keeps {quality['task_share']:.1%} of what the task's training gained" in text
    assert f"comparing {path.name} with the trained model" in talk
    assert f"llama-cli -m {path}" in text and f"ollama create my-model -f {trained / 'Modelfile'}" in text
    assert ("FROM", f"./{path.name}") in parse_modelfile((trained / "Modelfile").read_text("utf-8"))
    again = ["--overwrite", "--no-verify", "--dtype", "float16", "--gguf", "f16", *llama_cpp]
    assert run("merge", trained, *again) == 0
    [written] = report_of(trained / "merged")["gguf"]
    assert (written["type"], written["quality"]) == ("f16", None)
    assert "# Ollama, with the chat template" in capfd.readouterr().out


def test_without_llama_quantize_the_error_comes_first_and_says_what_to_install(
    trained: Path, llama_cpp: list[object], monkeypatch, capfd
) -> None:
    monkeypatch.setenv("PATH", "")
    for name in ("LLAMA_QUANTIZE", "LLAMA_CPP_DIR"):
        monkeypatch.delenv(name, raising=False)
    capfd.readouterr()
    assert run("merge", trained, "--gguf", "q5_k_m", *llama_cpp[:2]) == 2
    talk = capfd.readouterr().err
    assert "llama-quantize was not found on PATH" in talk and "hint: install llama.cpp" in talk
    assert "--gguf q8_0 and f16 do not need it" in talk
    assert not (trained / "merged").exists()
