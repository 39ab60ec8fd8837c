"""Some inputs of tests/campaigns/fuzz.py for everything that reads files, and tests of the fuzzer's own checks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from folora_q.errors import UserError
from tests.fuzz import contract
from tests.fuzz.campaign import Tally, hostile_inputs, run_random
from tests.fuzz.contract import Bench, Target
from tests.fuzz.targets import TARGETS

# For a target that is read fast; slower ones get fewer, by their rate.
EXAMPLES, HOSTILE = 60, 60
# Larger inputs of the fixed list are left out, except for these targets.
SMALL, WHOLE_LIST = 3_000_000, ("recipe", "adapter", "gates")
# Sampled text that cannot be read is sampled again.
NEVER_REFUSED = ("sampled text",)


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect() -> None:
    """Garbage of earlier tests that is collected while memory is measured would hide what a target takes."""
    gc.unfreeze()
    gc.collect()


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_read_or_refused_clearly(name: str, tmp_path: Path) -> None:
    target, tally = TARGETS[name], Tally(name)
    bench = Bench(target, tmp_path)
    limits = () if name in WHOLE_LIST else (SMALL, max(HOSTILE // target.rate, 2))
    for file, content in hostile_inputs(bench, *limits):
        tally.add(file, content, bench.judge(file, content))
    run_random(bench, tally, EXAMPLES // target.rate)
    assert not tally.findings, "\n".join(
        f"{finding.file} ({len(finding.content)} bytes, {finding.content[:80]!r}): {finding.verdict}"
        for finding in tally.findings.values()
    )
    assert tally.inputs >= 2 and (tally.refused or name in NEVER_REFUSED)


def bench_of(read: Callable[[Path, str], object], folder: Path) -> Bench:
    """A target of one file, a.json, that is read so unless it is as it was."""

    def build(folder: Path) -> None:
        (folder / "a.json").write_text("{}")

    def guarded(folder: Path, file: str) -> None:
        if (folder / file).read_bytes() != b"{}":
            read(folder, file)

    return Bench(Target("made up", build, {"a.json": "json"}, guarded), folder)


def raising(error: BaseException) -> Callable[[Path, str], None]:
    def read(folder: Path, file: str) -> None:
        raise error

    return read


def unpickling(folder: Path, file: str) -> None:
    import pickle

    pickle.loads(b"cbuiltins\nlen\n.")


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (raising(KeyError("a")), "KeyError: 'a'"),
        (raising(RecursionError("deep")), "RecursionError: deep"),
        (raising(MemoryError()), "MemoryError: "),
        (raising(SystemExit(2)), "SystemExit: 2"),
        (raising(UserError("something is wrong")), "its message does not say where: something is wrong"),
        (raising(UserError("a.json " * 5000)), "its message is empty, endless or a traceback"),
        (lambda folder, file: bytearray(300_000_000), "300 MB"),
        (
            lambda folder, file: (folder.parent.parent / "escaped").write_text("a"),
            "writes a file outside the folder",
        ),
        (lambda folder, file: (folder.parent.parent / "made").mkdir(), "os.mkdir of a file outside the folder"),
        (lambda folder, file: subprocess.run(["true"], check=True), "subprocess.Popen: "),
        (lambda folder, file: os.system("true"), "os.system: "),
        (unpickling, "pickle.find_class: "),
        (lambda folder, file: print("\udfff"), "UnicodeEncodeError: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_neither_is_found(read: Callable[[Path, str], object], told: str, tmp_path: Path) -> None:
    verdict = bench_of(read, tmp_path).judge("a.json", b"[]")
    assert verdict.kind == "finding" and verdict.told.startswith(told), verdict


def test_memory_is_measured_although_freed_memory_is_still_resident(tmp_path: Path) -> None:
    raised = bytearray(31_000_000)  # glibc takes smaller blocks from its heap after this is freed
    del raised
    blocks, last = [bytearray(20_000_000) for _ in range(16)], bytearray(1_000_000)
    del blocks  # free, but below a block in use
    verdict = bench_of(lambda folder, file: bytearray(300_000_000), tmp_path).judge("a.json", b"[]")
    assert verdict.told.startswith("300 MB"), (verdict, len(last))


def test_what_takes_long_is_found_and_what_never_ends_is_stopped(tmp_path: Path, monkeypatch) -> None:
    def endless(folder: Path, file: str) -> None:
        while True:
            pass

    def slow(folder: Path, file: str) -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    monkeypatch.setattr(contract, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(contract, "STOPPED_AFTER", 0.5)
    for number, (read, told) in enumerate(((slow, "0.2 s"), (endless, "_Stopped"))):
        (tmp_path / str(number)).mkdir()
        verdict = bench_of(read, tmp_path / str(number)).judge("a.json", b"[]")
        assert verdict.kind == "finding" and verdict.told.startswith(told), verdict


def test_a_clear_refusal_is_none_and_the_folder_is_valid_again(tmp_path: Path) -> None:
    bench = bench_of(raising(UserError("a.json is wrong", "write another")), tmp_path)
    assert bench.judge("a.json", b"[]").kind == "refused"
    assert bench.judge("a.json", b"{}").kind == "accepted"
    assert (bench.folder / "a.json").read_bytes() == b"{}"


def test_the_same_seed_makes_the_same_inputs(tmp_path: Path) -> None:
    seen: list[bytes] = []
    bench = bench_of(lambda folder, file: seen.append((folder / file).read_bytes()), tmp_path)
    run_random(bench, Tally("made up"), 40, start=3)
    once = list(seen)
    run_random(bench, Tally("made up"), 40, start=3)
    assert seen[len(once) :] == once and len(set(once)) > 20


def test_the_campaign_says_what_it_did(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.campaigns.fuzz", "lock", "--examples", "5"]
    command += ["--findings", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "lock" in done.stdout and "refused" in done.stdout and not (tmp_path / "found").exists()
