"""Run a part of a benchmark in a fresh process, whose time and peak memory are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import click

# mallopt(3): in a process with this environment, an allocation of this size or more returns to the system when freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# The peak of a process starts at that of the process that forked it, so a small process forks the measured one.
LAUNCHER = """
import os, sys, time
began = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - began, usage.ru_maxrss / 1e3, os.waitstatus_to_exitcode(status))
"""


def in_a_process(
    module: str, *arguments: object, environment: Mapping[str, str] | None = None, show_progress: bool = False
) -> Any:
    """Run `python -m module ...` and return the JSON value on the last line that it prints.

    Args:
        module: a benchmark, which must be importable from the current folder.
        environment: variables that are added to those of this process.
        show_progress: let the process write to this one's stderr, instead of showing that only if it fails.

    Raises:
        ClickException: the process failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=None if show_progress else subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(command[1:])} failed: {(done.stderr or '')[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_and_peak(command: list[str]) -> tuple[float, float]:
    """Run a command, and return its wall time in seconds and its peak memory in MB.

    Raises:
        ClickException: the command failed.
    """
    launched = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    seconds, peak, code = launched.stdout.split()[-3:]
    if code != "0":
        raise click.ClickException(f"{' '.join(command[:4])} failed: {launched.stderr[-500:]}")
    return float(seconds), float(peak)
