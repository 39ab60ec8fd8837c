"""Tokens of the environment, and those in URLs, stand in nothing that a run shows or writes."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from folora_q.cli.console import Concealing, concealing
from folora_q.storage.redaction import HIDDEN, conceal
from tests.conftest import write_recipe
from tests.faults.conftest import SAVING
from tests.security.hostile import run

HF, WANDB, PASSWORD = "hf_" + "Secret9Secret9" * 3, "0123456789abcdef" * 2 + "01234567", "correct-horse-battery"
SECRETS = (HF, WANDB, PASSWORD)
PROXY = f"http://ada:{PASSWORD}@proxy.example:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("HTTPS_PROXY", PROXY)


def told(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def written(folder: Path) -> list[str]:
    """Files below a folder that hold a secret, as text or among bytes."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS):
            found.append(str(path.relative_to(folder)))
    return found


def test_a_run_its_report_and_its_merge_hold_none(tiny_folder: Path, tmp_path: Path, capfd) -> None:
    recipe, output = write_recipe(tmp_path, tiny_folder), tmp_path / "run"
    assert run("--debug", "train", recipe, *SAVING, "gate.enabled=true", "gate.rank=8") == 0
    for command in (("report", output), ("merge", output), ("inspect", output), ("validate", recipe, "--all-rows")):
        assert run("--debug", *command) == 0
    assert run("eval", output, "--output", tmp_path / "numbers") == 0
    shown = capfd.readouterr()
    assert "KL" in shown.out and told(shown.out + shown.err) == []
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.json", "recipe.resolved.yaml", "metrics.jsonl", "README.md", "report.html", "merge.json"} <= names
    assert written(tmp_path) == []


def test_an_error_that_quotes_them_is_shown_and_kept_without(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """As clients of the network do: the proxy's URL, and the header that they were to send."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"ProxyError({PROXY}): header b'Bearer {HF}' of https://x/a?token={WANDB}&sig={WANDB}")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert run("train", recipe_file) == 2
    shown = capfd.readouterr()
    assert "ProxyError" in shown.err and told(shown.out + shown.err) == [] and "ada" not in shown.err
    kept = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert kept["status"] == "failed" and HIDDEN in kept["error"]
    assert run("report", tmp_path / "run") == 0
    assert written(tmp_path) == []


URL = f"https://ada:{PASSWORD}@host/model"


@pytest.mark.parametrize("option", [[], ["--debug"]], ids=["plain", "debug"])
@pytest.mark.parametrize("setting", [f"model.model_name_or_path={URL}", f"data.train_dataset={URL}"])
def test_a_name_with_a_password_is_not_repeated(setting: str, option: list[str], recipe_file: Path) -> None:
    """In a process of its own: a traceback is written when ours is over."""
    command = [sys.executable, "-m", "folora_q", "train", str(recipe_file), setting, *option]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (1 if option else 2)
    assert told(done.stdout + done.stderr) == [] and HIDDEN in done.stderr
    assert ("Traceback" in done.stderr) == bool(option)


@pytest.mark.parametrize(
    "command",
    [
        ("chat", URL, "--prompt", "hi"),
        ("eval", URL),
        ("merge", URL),
        ("init", "r.yaml", "--data", URL),
        ("report", URL),
    ],
)
def test_neither_is_one_on_the_command_line(command: tuple[str, ...], tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*command) == 2
    shown = capfd.readouterr()
    assert told(shown.out + shown.err) == [] and "host/model" in shown.err


def test_what_libraries_log_is_concealed_too(capfd) -> None:
    with concealing(stay=False):
        logger = logging.getLogger("a library")
        logger.addHandler(handler := logging.StreamHandler())
        logger.warning("sent %s", HF)
        print(f"{WANDB} to", file=sys.stderr)
        sys.stdout.writelines([PROXY, "\n"])
        logger.removeHandler(handler)
    shown = capfd.readouterr()
    assert told(shown.out + shown.err) == [] and f"sent {HIDDEN}" in shown.err and "proxy.example" in shown.out


def test_a_concealing_stream_is_the_stream_otherwise() -> None:
    stream = io.StringIO()
    concealing_stream = Concealing(stream)
    assert concealing_stream.write(f"a {HF} b") == len(f"a {HF} b")
    assert stream.getvalue() == f"a {HIDDEN} b" == concealing_stream.getvalue()
    assert not concealing_stream.isatty() and concealing_stream.encoding == stream.encoding


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pass@host/a", f"https://{HIDDEN}@host/a"),
        ("https://host/a@b and c@d.e", "https://host/a@b and c@d.e"),
        ("hf_models/hf_transfer", "hf_models/hf_transfer"),
        (f"x{HF}", f"x{HIDDEN}"),
        ("hf_oauth_" + "aB3" * 10, HIDDEN),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
        ("/get?token=abc&x=1", f"/get?token={HIDDEN}&x=1"),
        ("a=b?c", "a=b?c"),
    ],
)
def test_what_looks_like_a_secret(text: str, left: str) -> None:
    assert conceal(text) == left


def test_variables_that_say_yes_or_no_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("SOME_TOKEN", "")
    assert conceal("1 of 11") == "1 of 11"
