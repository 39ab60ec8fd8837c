"""`folora-q doctor`, as a person types it: on this machine, and on broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from folora_q.cli import doctor
from folora_q.cli.app import main
from folora_q.doctor import Check
from tests.doctor import faulty


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    return caught.value.code


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "folora_q", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_this_machine_can_train(tmp_path: Path) -> None:
    done = process("--json", HF_TOKEN="hf_notarealtoken", HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["can_train"] is True
    lines = {line["name"]: line for line in report["findings"]}
    assert {"python", "torch", "trl", "gpu", "precision", "4-bit layers", "memory", "disk", "hub"} <= set(lines)
    assert all(line["fix"] for line in lines.values() if line["state"] in ("warning", "failure"))
    assert lines["4-bit layers"]["state"] == "good"
    assert "a token is set" in lines["hub"]["fact"]
    assert "hf_" not in done.stdout and str(tmp_path) not in done.stdout and str(Path.cwd()) not in done.stdout


@pytest.fixture
def broken(tmp_path: Path):
    """Runs with packages that stand before the real ones."""

    def with_package(name: str, source: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / f"{name}.py").write_text(source)
        return process(PYTHONPATH=str(tmp_path))

    return with_package


def test_a_missing_torch_leaves_the_other_checks(broken) -> None:
    done = broken("torch", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    assert done.returncode == 1
    assert "✗ torch         2." in done.stdout and "does not load: No module named 'torch'" in done.stdout
    assert "✗ bitsandbytes  " in done.stdout and "→ fix torch first" in done.stdout
    assert "✗ 4-bit layers  not tested: No module named 'torch'" in done.stdout
    assert "✓ memory" in done.stdout and "disk" in done.stdout
    assert "Not ready to train: " in done.stdout
    assert "Traceback" not in done.stderr


def test_a_torch_that_crashes_leaves_the_other_checks(broken) -> None:
    done = broken("torch", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert done.returncode == 1
    assert "by the signal SIGILL: it was built for another kind of CPU" in done.stdout
    assert "✓ memory" in done.stdout


def test_nothing_heavy_is_imported_here() -> None:
    code = "import folora_q.cli.doctor, sys; assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exit_codes_and_lines(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(doctor, "CHECKS", faulty.CHECKS)
    assert run() == 0
    text, talk = capfd.readouterr()
    assert "! warns         odd\n                → mend it\n" in text
    assert text.endswith("Training can work on this machine.\n")
    assert "libraries talk" not in text + talk
    monkeypatch.setattr(doctor, "CHECKS", [*faulty.CHECKS, Check("fails", faulty.fails)])
    assert run() == 1
    text = capfd.readouterr().out
    assert "✗ fails         [bold]broken[/]\\x1b[2J\n" in text
    assert '→ pip install "x>=1"\n' in text
    assert text.endswith("Not ready to train: 1 problem to fix (✗)\n")
    assert run("--json") == 1
    report = json.loads(capfd.readouterr().out)
    assert report["can_train"] is False
    assert report["findings"][-1]["state"] == "failure"


def test_debug_shows_what_the_libraries_say(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [*faulty.CHECKS, Check("raises", faulty.raises)])
    assert run("--json", "--debug") == 1
    text, talk = capfd.readouterr()
    assert json.loads(text)["can_train"] is False
    assert "libraries talk" in talk and "ValueError: the cause" in talk
