"""Disk, memory, and the hub."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest

from folora_q.doctor import Finding, State, hub, machine
from folora_q.doctor.hub import check_hub
from folora_q.doctor.machine import check_disk, check_memory
from folora_q.doctor.optional_packages import check_gguf, check_lm_eval

TOKEN = "hf_notarealtoken"


@pytest.mark.parametrize(("free", "state"), [(0.5e9, State.FAILURE), (5e9, State.WARNING), (50e9, State.GOOD)])
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, free: float, state: State) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda folder: free)
    lines = check_disk()
    assert {line.state for line in lines} == {state}
    assert all(line.fact.startswith(f"{free / 1e9:.1f} GB free for ") for line in lines)
    assert all((line.fix is None) == (state is State.GOOD) for line in lines)


def test_folders_of_one_disk_share_a_line_and_are_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "deep"
    monkeypatch.setenv("FOLORA_Q_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (line,) = check_disk()
    assert line.fact.endswith(f"folora-q's cache ({cache}), the hub's cache ({tmp_path / 'hub'}), this folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(), shared.mkdir()
    monkeypatch.setenv("FOLORA_Q_CACHE", str(own))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(shared))
    real = machine.tempfile.TemporaryFile

    def read_only(dir: Path):
        if dir in (own, shared):
            raise OSError(30, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", read_only)
    first, second, *_ = check_disk()
    assert (first.state, first.fact) == (
        State.FAILURE,
        f"cannot write to folora-q's cache ({own}): Read-only file system",
    )
    assert "FOLORA_Q_CACHE" in first.fix
    assert second.state is State.WARNING and "HF_HOME" in second.fix  # models that lie there can still be read


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32e9, available=20e9))
    (found,) = check_memory()
    assert (found.state, found.fact) == (State.GOOD, "20.0 of 32.0 GB free")
    (tmp_path / "memory.max").write_text("max\n")
    assert check_memory() == [found]
    (tmp_path / "memory.max").write_text("2000000000\n")
    (found,) = check_memory()
    assert found.state is State.WARNING
    assert found.fact == "20.0 of 32.0 GB free, of which this container may use 2.0"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32e9, available=1e9))
    assert check_memory()[0].state is State.WARNING


# the hub


def ask(monkeypatch: pytest.MonkeyPatch, answer: int | Exception | float, token: str | None = TOKEN) -> Finding:
    """What is found where the hub answers with a status, with an error, or (a float) only after some seconds."""
    sent = []

    def get(url: str, headers: dict[str, str], timeout: float):
        sent.append((url, headers))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            time.sleep(answer)
        return SimpleNamespace(status_code=answer)

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: SimpleNamespace(get=get))
    (found,) = check_hub()
    assert sent[0][1] == ({"authorization": f"Bearer {token}"} if token else {})
    return found


def test_a_token_is_tried_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    good, refused = ask(monkeypatch, 200), ask(monkeypatch, 401)
    assert (good.state, good.fact) == (State.GOOD, "huggingface.co can be reached; it accepts the token")
    assert (refused.state, refused.fix) == (State.WARNING, "hf auth login")
    assert ask(monkeypatch, 404).fact == "huggingface.co can be reached; a token is set"  # a mirror without accounts
    assert TOKEN not in repr((good, refused))


def test_no_token_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, 401, token=None)
    assert found.state is State.GOOD and "no token" in found.fact


@pytest.mark.parametrize("answer", [403, 503, ConnectionError("Name or service not known")])
def test_a_hub_out_of_reach_is_a_warning(monkeypatch: pytest.MonkeyPatch, answer) -> None:
    found = ask(monkeypatch, answer)
    assert found.state is State.WARNING
    assert found.fix.endswith("local models and the demo still work")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    began = time.perf_counter()
    assert "no answer within 0.1 s" in ask(monkeypatch, 3.0).fact
    assert time.perf_counter() - began < 1


def test_offline_by_choice_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("asked"))
    (found,) = check_hub()
    assert found.state is State.WARNING and "unset HF_HUB_OFFLINE" in found.fix


# what is optional


def test_what_is_optional_is_never_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("folora_q.doctor.optional_packages.version", lambda name: "0.4.1")
    (found,) = check_lm_eval()
    assert (found.state, found.fact) == (State.NOTE, "0.4.1, outside >=0.4.9, for folora-q eval --tasks")
    assert found.fix.endswith('"lm-eval>=0.4.9"')
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert check_gguf()[0].state is State.NOTE
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert check_gguf()[0].fact == "convert_hf_to_gguf.py (folora-q merge --gguf)"
