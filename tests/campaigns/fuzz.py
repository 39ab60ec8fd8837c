"""Give damaged and malicious files to everything that reads files: each must be read, or refused with a clear error.

    .venv/bin/python -m tests.campaigns.fuzz --examples 20000      every target; about an hour and a half on two cores
    .venv/bin/python -m tests.campaigns.fuzz gates adapter --seconds 60
    .venv/bin/python -m tests.campaigns.fuzz --replay FINDINGS/gates/0a1b2c3d
    .venv/bin/python -m tests.campaigns.fuzz --atheris gates --seconds 600     guided by coverage; needs folora-q[fuzz]

tests/fuzz/contract.py defines what must hold, tests/fuzz/*_targets.py which function reads which files; the tests there
run the same with fewer inputs. Each target runs in its own process, so that an input that kills the process is found
too. `--examples` is the number for a target that is read fast; slower targets get fewer. atheris 3.0.0 was run on
Python 3.11. docs/reliability.md has the results of both.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
from rich.markup import escape
from rich.table import Table


def _instrumented() -> AbstractContextManager[Any]:
    """Return a context in which atheris instruments imported modules, if it is asked for: it sees their lines then."""
    if "--atheris" not in sys.argv:
        return nullcontext()
    import atheris

    return cast(Any, atheris).instrument_imports(
        include=["folora_q", "yaml", "peft.config"], enable_loader_override=False
    )


with _instrumented():
    from folora_q.cli.console import err, out, quiet_libraries, visible
    from tests.forked import returned_by_a_child
    from tests.fuzz.campaign import Finding, Tally, run_hostile, run_random
    from tests.fuzz.contract import Bench, Verdict

# Address space of a process: a file that needs more raises MemoryError, instead of exhausting the machine.
MAX_MAPPED_BYTES = 16 * 2**30
FINDINGS = Path("fuzz-findings")


@click.command()
@click.argument("names", nargs=-1, metavar="[TARGET ...]")
@click.option(
    "--examples", default=2000, show_default=True, type=click.IntRange(min=0), help="Random inputs of a fast target."
)
@click.option("--seconds", type=click.FloatRange(min=0), help="Maximum time for each target's random inputs.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same inputs.")
@click.option("--hostile/--no-hostile", default=True, help="Also run the fixed list. On by default.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Number of targets at a time.")
@click.option(
    "--findings", default=FINDINGS, show_default=True, type=click.Path(path_type=Path), help="Folder for the inputs."
)
@click.option("--messages", is_flag=True, help="Also show one refusal of each kind.")
@click.option("--replay", type=click.Path(path_type=Path, exists=True), help="Repeat the input in a finding's folder.")
@click.option("--atheris", "by_coverage", is_flag=True, help="Let atheris generate the inputs, for one TARGET.")
def main(
    names: tuple[str, ...],
    examples: int,
    seconds: float | None,
    seed: int,
    hostile: bool,
    jobs: int,
    findings: Path,
    messages: bool,
    replay: Path | None,
    by_coverage: bool,
) -> None:
    """Fuzz every TARGET, or only those named. The exit code is 1 if there was a finding."""
    quiet_libraries()
    if replay is not None:
        _replay(replay)
        return
    if by_coverage:
        _explore_by_coverage(names[0], seconds or 60.0, findings)
        return
    known = returned_by_a_child(_names)
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"there is no target {unknown[0]!r}; the targets are {', '.join(known)}")
    with ThreadPoolExecutor(jobs) as pool:
        run = partial(_explored, examples=examples, seconds=seconds, seed=seed, hostile=hostile)
        tallies = list(pool.map(run, names or known))
    table = _table(tallies)
    for tally in tallies:
        _show(tally, findings, messages)
    out.print(table)
    sys.exit(any(tally.count for tally in tallies))


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def _explored(name: str, *, examples: int, seconds: float | None, seed: int, hostile: bool) -> Tally:
    """Fuzz a target in its own process; if a signal ends that, its last input is a finding."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        place = Path(scratch) / "place"
        place.mkdir()
        try:
            tally = returned_by_a_child(_explore, name, place, examples, seconds, seed, hostile)
        except RuntimeError as error:
            raise click.ClickException(f"the fuzzer itself failed on {name}: {error}") from error
        except ChildProcessError as error:
            tally = Tally(name)
            file, content = _last_input(place)
            tally.add(file, content, Verdict("finding", str(error), "the process died"))
    err.print(f"  {name}: {tally.inputs:,} inputs, {time.monotonic() - began:,.0f} s", style="dim")
    return tally


def _explore(name: str, place: Path, examples: int, seconds: float | None, seed: int, hostile: bool) -> Tally:
    from tests.fuzz.targets import TARGETS

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MAPPED_BYTES, MAX_MAPPED_BYTES))
    os.environ["FOLORA_Q_CACHE"] = str(place / "cache")
    tempfile.tempdir = str(place)
    bench, tally = Bench(TARGETS[name], place), Tally(name)
    if hostile:
        run_hostile(bench, tally)
    until = float("inf") if seconds is None else time.monotonic() + seconds
    run_random(bench, tally, examples // bench.target.rate, seed, until)
    return tally


def _last_input(place: Path) -> tuple[str, bytes]:
    """Return the file that differs from the valid folder, and its content."""
    for path in sorted((place / "input").rglob("*")):
        valid = place / "valid" / path.relative_to(place / "input")
        if path.is_file() and (not valid.is_file() or valid.read_bytes() != path.read_bytes()):
            return str(path.relative_to(place / "input")), path.read_bytes()
    return "?", b""


def _table(tallies: list[Tally]) -> Table:
    table = Table(title="Outcomes of reading files", title_justify="left")
    headings = ("target", "inputs", "accepted", "refused clearly", "findings", "kinds", "slowest, s", "largest, MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for tally in tallies:
        counts = (tally.inputs, tally.accepted, tally.refused, tally.count, len(tally.findings))
        style = "bold red" if tally.count else ""
        peaks = f"{tally.slowest:.2f}", f"{tally.most / 1e6:,.0f}"
        table.add_row(tally.target, *(f"{count:,}" for count in counts), *peaks, style=style)
    table.add_section()
    sums = [sum(getattr(tally, name) for tally in tallies) for name in ("inputs", "accepted", "refused", "count")]
    table.add_row(
        "all", *(f"{total:,}" for total in sums), f"{sum(len(tally.findings) for tally in tallies):,}", "", ""
    )
    return table


def _show(tally: Tally, findings: Path, messages: bool) -> None:
    if messages:
        for message in sorted(tally.messages.values()):
            out.print(f"[dim]{tally.target}:[/] {escape(visible(message[:400]))}", soft_wrap=True)
    for finding in tally.findings.values():
        _show_finding(tally.target, finding, findings)


def _show_finding(target: str, finding: Finding, findings: Path) -> None:
    """Save the input, and print what it does and the command that repeats it."""
    digest = hashlib.sha256(finding.content).hexdigest()[:8]
    folder = findings / target.replace(": ", "-").replace(" ", "-") / digest
    path = folder / finding.file
    shutil.rmtree(folder, ignore_errors=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(finding.content)
    (folder / "target").write_text(target, encoding="utf-8")
    out.print(f"[bold red]{target}[/]: {escape(finding.verdict.alike)}", soft_wrap=True)
    out.print(f"  {escape(visible(finding.verdict.told))}", soft_wrap=True)
    out.print(f"  [cyan]{sys.executable} -m tests.campaigns.fuzz --replay {folder}[/]", soft_wrap=True)


def _replay(folder: Path) -> None:
    """Repeat a saved input, with the traceback of what it raises."""
    from tests.fuzz.targets import TARGETS

    target = TARGETS[(folder / "target").read_text(encoding="utf-8")]
    [path] = (path for path in folder.rglob("*") if path.is_file() and path != folder / "target")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        os.environ["FOLORA_Q_CACHE"] = f"{scratch}/cache"
        bench = Bench(target, Path(scratch))
        file = str(path.relative_to(folder))
        verdict = bench.judge(file, path.read_bytes())
        out.print(f"{verdict.kind}: {escape(visible(verdict.told))}", soft_wrap=True)
        if verdict.kind == "finding":
            (bench.folder / file).write_bytes(path.read_bytes())
            target.read(bench.folder, file)
            sys.exit(1)


def _explore_by_coverage(name: str, seconds: float, findings: Path) -> None:
    """Let atheris generate inputs that reach new lines of Python code, ours and libraries'; this ends the process."""
    import atheris

    with _instrumented():
        from tests.fuzz.targets import TARGETS

        place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        os.environ["FOLORA_Q_CACHE"] = str(place / "cache")
        bench, tally = Bench(TARGETS[name], place), Tally(name)
    corpus, files = place / "corpus", list(bench.target.files)
    corpus.mkdir()
    for number, file in enumerate(files):
        (corpus / str(number)).write_bytes(bytes([number]) + bench.seeds[file])
    until = time.monotonic() + seconds

    def one_input(data: bytes) -> None:
        file, content = files[data[0] % len(files) if data else 0], data[1:]
        verdict, known = bench.judge(file, content), len(tally.findings)
        tally.add(file, content, verdict)
        if len(tally.findings) > known:
            _show_finding(name, tally.findings[verdict.alike], findings)
        if time.monotonic() > until:
            out.print(_table([tally]))
            shutil.rmtree(place, ignore_errors=True)
            os._exit(bool(tally.count))

    longest = 2 * max(map(len, bench.seeds.values()))
    atheris.Setup([sys.argv[0], str(corpus), f"-max_len={longest}", "-rss_limit_mb=8000", "-verbosity=0"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
