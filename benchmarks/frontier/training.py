"""Train a method; all methods get the same rows in the same order, the same schedule and the same clipping."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from benchmarks.frontier.methods.base import Method, Step
from benchmarks.frontier.testbed import Testbed
from folora_q.data.tokens import IGNORED, Batch, batches
from folora_q.errors import RunError
from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import PeakMemory
from folora_q.models.logits import head_logits, hidden_states
from folora_q.models.parts import base_of

WARMUP = 0.03
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Cost:
    """The cost of training: seconds before the first step, seconds of the steps, and peak memory.

    On a CPU, where other processes may run, seconds are processor time, otherwise wall time. They exclude the
    statistics, which are collected once for all methods, and measurements during training.
    """

    preparing: float
    seconds: float
    peak_bytes: int | None


# Called before the first step (0) and after each step, with the number of steps made and the model.
Watch = Callable[[int, PeftModel], None]


def train(
    testbed: Testbed, method: Method, seed: int, steps: int, watch: Watch = lambda step, model: None
) -> tuple[PeftModel, Cost]:
    """Return a tuned model and its cost. If training fails, the base is left unchanged.

    Raises:
        RunError: the loss is not finite.
    """
    model = method.tuned(testbed, seed)
    try:
        return model, _trained(testbed, method, model, seed, steps, watch)
    except Exception:
        release(method, model)
        raise


def _trained(testbed: Testbed, method: Method, model: PeftModel, seed: int, steps: int, watch: Watch) -> Cost:
    pairs = adapter_pairs(model)
    device = testbed.base.device.type
    meter = PeakMemory(testbed.base.device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    method.start(testbed, model, pairs)
    optimizer = method.optimizer(testbed, model, pairs)
    preparing, seconds = clock() - began, 0.0
    watch(0, model)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = base_of(model)
    # Float32 adapters on a 16-bit base compute in 16 bits, as in `folora-q train` on a GPU.
    sixteen_bit = torch.autocast(device, testbed.base.dtype, enabled=testbed.base.dtype != torch.float32)
    meter.reset()
    for number, batch in zip(range(steps), shuffled(testbed, seed), strict=False):
        start = clock()
        targets = batch.labels[:, 1:]
        counted = targets != IGNORED
        with sixteen_bit:
            hidden = hidden_states(inner, batch.input_ids, batch.attention_mask)[:, :-1][counted]
            logits = head_logits(inner, hidden)
            step = Step(number, batch.input_ids, batch.attention_mask, counted, targets[counted], logits)
            loss = cross_entropy(step.logits, step.wanted)
            penalty = method.penalty(testbed, model, step)
        if penalty is not None:
            loss = loss + penalty
        if not torch.isfinite(loss):
            raise RunError(f"the loss of {method} is not finite at step {number}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step(pairs)
        seconds += clock() - start
        watch(number + 1, model)
    return Cost(preparing, seconds, meter.peak())


def release(method: Method, model: PeftModel) -> None:
    """Remove the adapter from the base that all runs share; a 16-bit method had a copy."""
    if not method.sixteen_bit:
        model.unload()


def shuffled(testbed: Testbed, seed: int) -> Iterator[Batch]:
    """Yield batches of the training rows without end, in an order that depends only on the seed."""
    ids, labels = testbed.rows()
    size, chance = testbed.recipe.training.per_device_train_batch_size, random.Random(seed)
    while True:
        order = chance.sample(range(len(ids)), len(ids))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield next(batches([ids[i] for i in rows], size, testbed.base.device, [labels[i] for i in rows]))
