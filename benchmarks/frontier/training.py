"""The one loop that every method runs in: same rows in the same order, same schedule, same clipping."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from benchmarks.frontier.ground import Ground
from benchmarks.frontier.methods.base import Method, Step
from folora_q.data.tokens import IGNORED, Batch, batches
from folora_q.errors import RunError
from folora_q.models.adapters import adapter_pairs
from folora_q.models.hardware import PeakMemory
from folora_q.models.logits import head_logits, hidden_states

WARMUP = 0.03
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Cost:
    """What training took; `preparing` is what a method does before the first step.

    Seconds are of the processor on a CPU, where other processes may run, else of the wall. They leave out the
    statistics, which are collected once for all methods, and what is measured during training.
    """

    preparing: float
    seconds: float
    peak_bytes: int | None


# Called before the first step (0) and after each step, with the number of steps made and the model.
Watch = Callable[[int, PeftModel], None]


def train(
    ground: Ground, method: Method, seed: int, steps: int, watch: Watch = lambda step, model: None
) -> tuple[PeftModel, Cost]:
    """A tuned model. Where it fails, the base is as it was.

    Raises:
        RunError: the loss is not finite.
    """
    model = method.tuned(ground, seed)
    try:
        return model, _trained(ground, method, model, seed, steps, watch)
    except Exception:
        release(method, model)
        raise


def _trained(ground: Ground, method: Method, model: PeftModel, seed: int, steps: int, watch: Watch) -> Cost:
    pairs = adapter_pairs(model)
    device = ground.base.device.type
    meter = PeakMemory(ground.base.device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    method.start(ground, model, pairs)
    optimizer = method.optimizer(ground, model, pairs)
    preparing, seconds = clock() - began, 0.0
    watch(0, model)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = model.get_base_model()
    # Float32 adapters on a 16-bit base compute in 16 bits, as under the product's Trainer on a GPU.
    sixteen_bit = torch.autocast(device, ground.base.dtype, enabled=ground.base.dtype != torch.float32)
    meter.reset()
    for number, batch in zip(range(steps), shuffled(ground, seed), strict=False):
        start = clock()
        targets = batch.labels[:, 1:]
        counted = targets != IGNORED
        with sixteen_bit:
            hidden = hidden_states(inner, batch.input_ids, batch.attention_mask)[:, :-1][counted]
            logits = head_logits(inner, hidden)
            step = Step(number, batch.input_ids, batch.attention_mask, counted, targets[counted], logits)
            loss = cross_entropy(step.logits, step.wanted)
            penalty = method.penalty(ground, model, step)
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
    """Take the adapter off the base that all runs share; a method in 16 bits has had a copy."""
    if not method.sixteen_bit:
        model.unload()


def shuffled(ground: Ground, seed: int) -> Iterator[Batch]:
    """Batches of the training rows without end, in an order that depends on the seed alone."""
    ids, labels = ground.rows()
    size, chance = ground.recipe.training.per_device_train_batch_size, random.Random(seed)
    while True:
        order = chance.sample(range(len(ids)), len(ids))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield next(batches([ids[i] for i in rows], size, ground.base.device, [labels[i] for i in rows]))
