"""One writer in a run folder: found while it runs, seen through when it is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from folora_q.errors import UserError
from folora_q.runs import lock
from folora_q.runs.lock import NAME, locked
from tests.faults.commands import run


def test_a_lock_names_its_process_and_is_gone_afterwards_also_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with pytest.raises(KeyError), locked(folder, print):
        held = json.loads((folder / NAME).read_text())
        assert held["pid"] == os.getpid() and held["host"] == socket.gethostname()
        raise KeyError
    assert not (tmp_path / "a").exists(), "a folder that was made for it alone goes too"
    folder.mkdir(parents=True)
    (folder / "run.json").touch()
    with locked(folder, print):
        pass
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_second_run_is_refused_and_named(recipe_file: Path, tmp_path: Path, capfd) -> None:
    with locked(tmp_path / "run", print):
        for more in ([], ["--overwrite"], ["--resume"]):
            assert run(recipe_file, *more) == 2
            assert f"process {os.getpid()} is writing in {tmp_path / 'run'}" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path: Path) -> None:
    code = "import pathlib, sys, time\nfrom folora_q.runs.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1]), print): time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    try:
        while not ((tmp_path / NAME).exists() and (tmp_path / NAME).read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(UserError, match=f"process {process.pid} is writing"), locked(tmp_path, print):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    told: list[str] = []
    with locked(tmp_path, told.append):
        pass
    assert told == [f"took over {tmp_path} from process {process.pid}: it is gone"]


def stale(tmp_path: Path, **changes: object) -> list[str]:
    """What is told when a lock of ours with some other entries is met."""
    with locked(tmp_path, print):
        held = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(held | changes))
    told: list[str] = []
    with locked(tmp_path, told.append):
        assert json.loads((tmp_path / NAME).read_text()) == held
    return told


def test_another_process_with_the_same_number_is_not_taken_for_it(tmp_path: Path) -> None:
    [line] = stale(tmp_path, started=psutil.Process().create_time() - 3600)
    assert line.endswith("its process id now belongs to another process")


def test_a_lock_from_before_a_restart_of_the_machine_is_stale(tmp_path: Path) -> None:
    [line] = stale(tmp_path, boot="another")
    assert line.endswith("the machine has been restarted since")


def test_a_lock_of_another_machine_is_never_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="process [0-9]+ on elsewhere is writing") as caught:
        stale(tmp_path, host="elsewhere")
    assert f"remove {tmp_path / NAME}" in caught.value.hint


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_a_damaged_lock_holds_nobody_back(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with locked(tmp_path, print):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_of_many_that_take_over_at_once_one_succeeds(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("damaged")
    ready, go = os.pipe()
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os.read(ready, 1)
            try:
                with locked(tmp_path, lambda line: None):
                    time.sleep(0.5)
                    os._exit(0)
            except UserError:
                os._exit(3)
            os._exit(4)
        children.append(child)
    os.write(go, b"x" * len(children))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0] + [3] * 7


def test_no_space_at_all_is_found_at_once(recipe_file: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(lock, "free_bytes", lambda folder: 0)
    assert run(recipe_file) == 2
    talk = capfd.readouterr().err
    assert f"not enough disk space for the run folder {tmp_path / 'run'}: 0.0 MB" in talk and "loading" not in talk


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes root, to become somebody else")
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path, there: bool) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:  # pytest's own folders, one more with several processes
            path.chmod(0o755)
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        folder.chmod(0o555)
    child = os.fork()
    if child == 0:  # root may write anywhere
        os.setuid(65534)
        try:
            with locked(folder, print):
                os._exit(1)
        except UserError as error:
            os._exit(0 if error.message == f"cannot use {folder} as the run folder: Permission denied" else 2)
        except BaseException:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
