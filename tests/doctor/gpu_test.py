"""GPUs that are there, or not, or that torch cannot use. No test needs one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from folora_q.doctor import Finding, State, compute, gpu
from folora_q.doctor.compute import check_compute
from folora_q.doctor.gpu import check_gpu
from folora_q.doctor.nvidia import Card, Driver, ask_driver, torch_install

ADA = Driver((Card("RTX 4090", "580.65.06", 8.9),))
WHEELS = "https://download.pytorch.org/whl"


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what the driver and torch say."""

    def say(driver: Driver | None, build: str | None, refusal: str | None = None, **seen) -> Finding:
        def init() -> None:
            raise RuntimeError(f"{refusal}\nand more")

        monkeypatch.setattr(gpu, "ask_driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen))
        answers = {
            "get_device_name": "RTX 4090",
            "get_device_capability": (8, 9),
            "get_arch_list": ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"],
            "mem_get_info": (24_000_000_000, 25_300_000_000),
            "device_count": 1,
        } | seen
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
        (found,) = check_gpu()
        return found

    return say


def test_no_gpu_is_a_warning(machine) -> None:
    found = machine(None, None)
    assert (found.state, found.fact) == (State.WARNING, "none found; torch is a CPU build")
    assert "training runs on the CPU, which is enough for the demo" in found.fix


def test_a_gpu_and_a_cpu_build_is_a_failure_with_the_line_that_mends_it(machine) -> None:
    found = machine(ADA, None)
    assert (found.state, found.fact) == (
        State.FAILURE,
        "RTX 4090, driver 580.65.06, is there, but torch is a CPU build",
    )
    assert found.fix.endswith(f'install --force-reinstall "torch>=2.11" --index-url {WHEELS}/cu130')


def test_a_driver_too_old_for_the_build_gets_an_older_build(machine) -> None:
    old = Driver((Card("RTX 4090", "550.54.14", 8.9),))
    found = machine(old, "13.0", "The NVIDIA driver on your system is too old (found version 12040).")
    assert found.state is State.FAILURE
    assert found.fact.endswith("cannot use it: The NVIDIA driver on your system is too old (found version 12040).")
    assert found.fix.endswith(f"{WHEELS}/cu126")


def test_a_gpu_that_cuda_cannot_start_on_is_a_failure(machine) -> None:
    found = machine(ADA, "13.0", "CUDA unknown error")
    assert found.state is State.FAILURE and found.fact.endswith("cannot use it: CUDA unknown error")
    assert "modprobe nvidia_uvm" in found.fix


def test_a_gpu_that_is_hidden_is_a_warning(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine(ADA, "13.0", "No CUDA GPUs are available")
    assert (found.state, found.fix) == (State.WARNING, "unset CUDA_VISIBLE_DEVICES")


def test_a_driver_that_fails_is_a_warning(machine) -> None:
    found = machine(Driver(trouble="Driver/library version mismatch"), "13.0")
    assert found.state is State.WARNING and "restart" in found.fix
    assert found.fact == "none usable: nvidia-smi fails (Driver/library version mismatch); torch is built for CUDA 13.0"


def test_a_gpu_is_described(machine) -> None:
    found = machine(ADA, "13.0", device_count=2)
    assert found.state is State.GOOD
    assert found.fact == (
        "RTX 4090, compute capability 8.9, 24.0 of 25.3 GB free; torch is built for CUDA 13.0; driver 580.65.06; "
        "one of 2 GPUs, and training uses one"
    )


def test_memory_that_others_hold_is_a_warning(machine) -> None:
    found = machine(None, "13.0", mem_get_info=(5_000_000_000, 25_300_000_000))
    assert found.state is State.WARNING and "nvidia-smi" in found.fix


@pytest.mark.parametrize(
    ("capability", "targets", "runs"),
    [
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 1), ["sm_50", "sm_60"], True),
        ((7, 0), ["sm_75", "sm_120", "compute_120"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_a_failure(machine, capability, targets, runs: bool) -> None:
    found = machine(ADA, "13.0", get_device_capability=capability, get_arch_list=targets)
    assert (found.state is State.GOOD) == runs
    if not runs:
        assert f"has no code for RTX 4090, compute capability {capability[0]}.{capability[1]}" in found.fact
        assert WHEELS in found.fix


@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        ("580.65.06", 8.9, "cu130"),
        ("580.65.06", 12.0, "cu130"),
        ("580.65.06", 7.0, "cu126"),  # Volta: CUDA 13 has no code for it
        ("550.54.14", 8.9, "cu126"),
        ("550.54.14", None, "cu126"),
    ],
)
def test_the_build_of_torch_goes_with_driver_and_gpu(driver: str, capability: float | None, build: str) -> None:
    command = torch_install(Driver((Card("x", driver, capability),)), "torch")
    assert command.endswith(f"{WHEELS}/{build}") and not command.startswith("update")


@pytest.mark.parametrize(
    ("driver", "capability", "needed", "build"),
    [("570.86.10", 12.0, 580, "cu130"), ("470.82.01", 8.6, 580, "cu130"), ("470.82.01", 7.0, 525, "cu126"),
     ("[N/A]", None, 580, "cu130")],
)  # fmt: skip
def test_a_driver_that_no_build_works_with_is_to_be_updated(driver, capability, needed: int, build: str) -> None:
    command = torch_install(Driver((Card("x", driver, capability),)), "torch")
    assert command.startswith(f"update the NVIDIA driver to {needed} or newer, then ")
    assert command.endswith(build)


def smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Driver | None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    return ask_driver()


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = smi(tmp_path, "echo 'NVIDIA L4, 580.65.06, 8.9'; echo 'Tesla T4, 580.65.06, 7.5'", monkeypatch)
    assert two == Driver((Card("NVIDIA L4", "580.65.06", 8.9), Card("Tesla T4", "580.65.06", 7.5)))
    old = 'case "$1" in *compute_cap*) echo Field is not valid; exit 2;; *) echo "Tesla K80, 450.1";; esac'
    assert smi(tmp_path, old, monkeypatch) == Driver((Card("Tesla K80", "450.1", None),))
    mismatch = smi(tmp_path, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18", monkeypatch)
    assert mismatch == Driver(trouble="Failed to initialize NVML: Driver/library version mismatch")
    assert smi(tmp_path, "echo No devices were found", monkeypatch) == Driver(trouble="No devices were found")
    assert smi(tmp_path, "exit 9", monkeypatch) == Driver(trouble="exit code 9")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert ask_driver() is None


# where it computes


def test_a_gpu_without_bfloat16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    (found,) = check_compute()
    assert (found.state, found.fact) == (State.WARNING, "float16 on Tesla T4, which has no bfloat16")
    assert "model.dtype=float32" in found.fix


def test_a_setting_that_leaves_cores_idle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(compute, "_cores", lambda: 8)
    precision, threads = check_compute()
    assert precision.state is State.GOOD
    assert (threads.state, threads.fact) == (State.WARNING, "OMP_NUM_THREADS leaves torch 1 of 8 CPU cores")
    monkeypatch.setattr(compute, "_cores", lambda: 1)
    assert check_compute() == [precision]
