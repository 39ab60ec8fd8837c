"""What a launcher set is checked before anything is written, and of several GPUs one process uses one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl import SFTConfig

from folora_q.cli.app import main
from folora_q.distributed.launch import launched_processes, require_one_process
from folora_q.errors import UserError
from folora_q.models.hardware import choose_hardware
from folora_q.training.config import on_one_device


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("command", [["train"], ["train", "--resume"], ["train", "--overwrite"]])
def test_processes_that_cannot_find_each_other_are_refused_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, variable: str, command: list[str]
) -> None:
    monkeypatch.setenv(variable, "4")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "failed"}')
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([command[0], str(recipe_file), *command[1:]])
    assert caught.value.code == 2
    talk = capfd.readouterr().err
    assert "error: this is one of 4 processes" in talk and "torchrun --nproc-per-node 2 -m folora_q" in talk
    assert "[done]" not in talk and everything(tmp_path) == before


@pytest.mark.parametrize("command", ["merge", "eval"])
def test_commands_of_one_process_say_so(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"`folora-q {command}` runs in one process, and this is one of 2"):
        require_one_process(command)


def test_it_is_known_before_torch_is_imported(recipe_file: Path) -> None:
    code = f"from folora_q.cli.app import main\nimport sys\ntry: main(['train', {str(recipe_file)!r}])\n"
    code += "except SystemExit as end: assert end.code == 2\nassert 'torch' not in sys.modules"
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["1", "", "0", "many", "-3"])
def test_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert launched_processes() == 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says where it sees two GPUs; none of them is computed on."""
    answers = {"is_available": True, "device_count": 2, "current_device": 0, "set_device": None}
    answers |= {"get_device_name": "NVIDIA GeForce RTX 3060", "is_bf16_supported": True}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def test_of_two_gpus_one_is_used_and_said(two_gpus: None) -> None:
    hardware = choose_hardware()
    assert hardware.device == torch.device("cuda", 0)
    assert hardware.others == (
        "2 GPUs are visible, and only cuda:0, NVIDIA GeForce RTX 3060, is used; CUDA_VISIBLE_DEVICES selects another"
    )
    assert choose_hardware("float16").others == hardware.others


def test_of_one_device_nothing_is_said(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_hardware().others is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_hardware().others is None


def test_transformers_takes_one_gpu_of_two_and_the_batch_of_the_recipe(two_gpus: None, tmp_path: Path) -> None:
    """It would wrap the model in DataParallel, and train on twice the sequences in half of the steps."""
    config = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, bf16=True)
    assert (config.n_gpu, config.train_batch_size) == (2, 8), "the trap that is avoided"
    on_one_device(config)
    assert (config.n_gpu, config.train_batch_size) == (1, 4)
    on_a_cpu = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False)
    on_one_device(on_a_cpu)
    assert (on_a_cpu.n_gpu, on_a_cpu.train_batch_size) == (0, 4)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_CPU", "1"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_a_launcher_that_changes_how_is_trained_is_refused_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """With one process too: DeepSpeed's package was missed after sampling, and float16 was computed in unasked."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe_file)])
    assert caught.value.code == 2
    talk = capfd.readouterr().err
    assert f"error: the environment sets {variable}={value}, which makes accelerate train differently" in talk
    assert f"or unset {variable}\n" in talk and not (tmp_path / "run").exists()


def test_a_launcher_that_changes_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --num_processes 1` sets them."""
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "false"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert launched_processes() == 1


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("DEEPSPEED", "ZeRO-3 does not shard weights that were loaded in 4 bits"),
        ("FSDP", "since it would shard the adapter too"),
    ],
)
def test_an_engine_that_cannot_be_used_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, engine: str, reason: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=reason) as caught:
        launched_processes()
    assert caught.value.hint is not None and "torchrun" in caught.value.hint
