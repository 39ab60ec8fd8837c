"""Run one function in several processes of a group on gloo: forks of this process, which pay for no import."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from folora_q.cli.app import main
from tests.forked import FAILED

KILLED = "killed"


def together(count: int, function: Callable[[int], Any], seconds: float = 120) -> list[Any]:
    """Return what a function returns in each of several processes, which are given the variables of torchrun.

    A process that ended without a result has `KILLED`; if it failed, it has printed why.

    Raises:
        AssertionError: they did not end in time.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes, results = [], []
    for rank in range(count):
        receiving, sending = context.Pipe(duplex=False)

        def act(rank: int = rank, sending: Any = sending) -> None:
            variables = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in variables.items()}
            if torch.cuda.device_count() < count:  # then all compute on the CPU, and send with gloo
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            forget_the_group()
            try:
                sending.send(function(rank))
            except BaseException:
                traceback.print_exc()
                sys.exit(FAILED)

        process = context.Process(target=act)
        process.start()
        sending.close()
        processes.append(process)
        results.append(receiving)
    found: list[Any] = [KILLED] * count
    try:
        left = dict(zip(results, range(count), strict=True))
        while left:
            ready = wait(list(left), seconds)
            assert ready, f"processes {sorted(left.values())} did not end within {seconds:.0f} s"
            for each in results:
                if each in ready:
                    rank = left.pop(each)
                    with suppress(EOFError):
                        found[rank] = each.recv()
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
    return found


def forget_the_group() -> None:
    """Forget the group that this process has inherited from the one that it was forked from."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run_together(
    count: int, arguments: Sequence[object], output: Path, before: Callable[[int], None] = lambda rank: None
) -> list[Any]:
    """Run `folora-q` in several processes, and return their exit codes; each writes to `output` and its rank.

    Args:
        before: called in each process first, with its rank.
    """

    def run(rank: int) -> int:
        before(rank)
        for stream in (1, 2):
            os.dup2(os.open(f"{output}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return together(count, run)
