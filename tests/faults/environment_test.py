"""Odd surroundings: locales, paths, homes, clocks, narrow terminals, readers that leave. It works, or says why not."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from folora_q.cli.app import main
from folora_q.training.checkpoints import step_of
from tests.conftest import write_recipe
from tests.faults.commands import assert_the_same_run, at_step, manifest, run, signalled, steps_saved
from tests.forked import in_a_child

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python takes UTF-8 for it
NARROW = {"COLUMNS": "40"}
# linux/prctl.h and linux/capability.h: what lets root write to any folder.
CAPBSET_DROP, DAC_OVERRIDE, DAC_READ_SEARCH = 24, 1, 2


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`folora-q` with an environment of its own, and without root's right to ignore a folder's permissions."""

    def lose_privileges() -> None:
        for capability in (DAC_OVERRIDE, DAC_READ_SEARCH):
            if os.geteuid() == 0:
                ctypes.CDLL(None).prctl(CAPBSET_DROP, capability, 0, 0, 0)

    return subprocess.run(
        [sys.executable, "-m", "folora_q", *map(str, arguments)],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        preexec_fn=lose_privileges,
        capture_output=True,
        timeout=120,
    )


def test_without_utf_8_without_a_home_and_in_a_narrow_terminal(recipe_file: Path, tmp_path: Path) -> None:
    read_only = tmp_path / "read only"
    read_only.mkdir(mode=0o555)
    surroundings = {**ASCII, **NARROW, "HOME": str(read_only / "home"), "HF_HOME": str(read_only / "hub")}
    surroundings["FOLORA_Q_CACHE"] = str(tmp_path / "cache")
    trained = in_a_process("train", recipe_file, "evaluation.metric=none", **surroundings)
    assert trained.returncode == 0, trained.stderr
    text = trained.stdout.decode("ascii")
    for found in json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))["texts"]:
        assert f"{found['loss']['base']['value']:.4f}" in text, "no number is cut off"
    assert b"[done] training" in trained.stderr and trained.stderr.isascii()
    reported = in_a_process("report", tmp_path / "run", **surroundings)
    assert reported.returncode == 0 and (tmp_path / "run" / "report.html").exists()
    assert b"atplotlib" not in reported.stderr, "its remarks on the home are nobody's business"
    assert not list(read_only.iterdir())


def test_a_path_that_the_locale_cannot_name_is_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    recipe.write_text(recipe.read_text().replace("heldout.jsonl", "zurückgehalten.jsonl"), encoding="utf-8")
    refused = in_a_process("validate", recipe, **ASCII)
    assert refused.returncode == 2
    assert b"cannot be named in this locale, whose encoding is ascii: set LC_ALL=C.UTF-8" in refused.stderr
    here = in_a_process("validate", tmp_path / "Bücher.yaml", **ASCII)
    assert here.returncode == 2 and b"Traceback" not in here.stderr


def test_spaces_and_any_alphabet_in_every_path(tiny_folder: Path, tmp_path: Path, capfd) -> None:
    place = tmp_path / "Zwölf Bücher (数据) & $HOME's"
    place.mkdir()
    model = Path(shutil.copytree(tiny_folder, place / "le modèle"))
    recipe, folder = write_recipe(place, model), place / "run"
    assert run(recipe, "evaluation.metric=none", "gate.enabled=false") == 0
    for command in (["merge", folder], ["report", folder]):
        with pytest.raises(SystemExit) as end:
            main(list(map(str, command)))
        assert end.value.code == 0, command
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  ") and "Zwölf" in line]
    commands = [line for line in lines if "from_pretrained" not in line]
    assert len(commands) == 4, "what to type next, after training and after merging"
    for line in commands:
        assert any(str(folder) in word or word == str(recipe) for word in shlex.split(line)), line


def test_without_a_place_for_the_cache_it_says_how_to_name_one(
    recipe_file: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    (tmp_path / "home").touch()
    for name in ("FOLORA_Q_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(recipe_file) == 1
    talk = capfd.readouterr().err
    assert f"error: {tmp_path / 'home'}" in talk and "hint: set FOLORA_Q_CACHE to a folder" in talk
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert run(recipe_file) == 1
    talk = capfd.readouterr().err
    assert "error: no home folder is known for the cache" in talk and "set FOLORA_Q_CACHE" in talk


def test_text_that_cannot_be_kept_in_the_cache_is_the_runs_all_the_same(
    saving: list[object], finished: Path, tmp_path: Path, capfd
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "proxy").touch()
    assert run(*saving) == 0
    assert "sampled text could not be saved in " in capfd.readouterr().err
    assert_the_same_run(finished, tmp_path / "stopped" / "run")


def test_offline_a_model_of_the_hub_is_a_sentence(recipe_file: Path, capfd) -> None:
    assert run(recipe_file, "model.model_name_or_path=nobody/no-such-model") == 2
    talk = capfd.readouterr().err
    assert "nobody/no-such-model" in talk and "Traceback" not in talk


@pytest.mark.parametrize(
    "arguments", [["--help"], ["schema"], ["recipes"], ["train", "RECIPE", "--dry-run"], ["estimate", "RECIPE"]]
)
def test_a_reader_that_has_gone_ends_it_quietly(recipe_file: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [str(recipe_file) if argument == "RECIPE" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-m", "folora_q", *command], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""


def test_a_run_whose_reader_has_gone_is_interrupted_and_goes_on(
    saving: list[object], finished: Path, tmp_path: Path
) -> None:
    def unread() -> None:
        reader, writer = os.pipe()
        sys.stderr = os.fdopen(writer, "w", buffering=1)
        at_step(pytest.MonkeyPatch(), 4, lambda: os.close(reader))  # the next line that is told meets nobody
        main(["train", *map(str, saving)])

    assert in_a_child(unread) == 1
    folder = tmp_path / "stopped" / "run"
    assert manifest(folder)["status"] == "interrupted"
    assert run(*saving, "--resume") == 0
    assert_the_same_run(finished, folder)


def test_a_clock_that_jumps_back_changes_nothing(
    saving: list[object], finished: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    folder, now, behind = tmp_path / "stopped" / "run", time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() - behind[0])
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: behind.append(behind.pop() + 86_400))
        assert run(*saving) == 0
    assert_the_same_run(finished, folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        at_step(patch, 5, signalled(signal.SIGINT))
        assert run(*saving) == 130
    for checkpoint in folder.glob("checkpoint-*"):  # the latest step has the oldest date
        for path in (checkpoint, *checkpoint.iterdir()):
            os.utime(path, (1e9 - step_of(checkpoint), 1e9 - step_of(checkpoint)))
    assert steps_saved(folder) == [2, 4, 5]
    behind[0] += 86_400
    capfd.readouterr()
    assert run(*saving, "--resume") == 0
    assert "resuming from checkpoint-5" in capfd.readouterr().err
    assert_the_same_run(finished, folder)
