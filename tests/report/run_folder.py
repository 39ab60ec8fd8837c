"""Run folders with plausible numbers, as training and evaluation write them, without a model."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folora_q.recipe.strict_yaml import dump_yaml
from folora_q.runs.folder import RunFolder
from folora_q.runs.result_files import answer_lines, to_json
from folora_q.runs.results import (
    AnswerResult,
    Evaluation,
    GateResult,
    HarnessResult,
    Interval,
    LayerResult,
    PairedChange,
    ScoreResult,
    TextKind,
    TextResult,
)

# Modules that read one tensor, with its width.
INPUTS = [
    (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 576),
    (["self_attn.o_proj"], 576),
    (["mlp.gate_proj", "mlp.up_proj"], 576),
    (["mlp.down_proj"], 1536),
]
BASE_LOSS = 2.833
GATE_LAMBDA = 16.0
# KL on generated text, whole and cut, in terms of that of the whole.
CUT = 0.8
OWN_MEAN = (1 + CUT) / 2


@dataclass(frozen=True)
class Shape:
    """How a made-up run went.

    Attributes:
        kl_scale: KL at the end; plain QLoRA's is about ten times the gated one's.
        every: steps between measurements along training; None for a run without evaluation.steps.
        harness: whether lm-eval ran.
    """

    gated: bool = True
    layers: int = 30
    steps: int = 200
    every: int | None = 20
    final_loss: float = 0.043
    kl_scale: float = 0.125
    score: bool = True
    harness: bool = False
    seed: int = 0
    fingerprint: str = "6fe1c0f5e4bf"


def write_run(path: Path, shape: Shape = Shape(), **manifest: Any) -> RunFolder:
    """A whole run; what is in `manifest` replaces keys of run.json."""
    run = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    run.write_manifest(_manifest(shape) | manifest)
    run.recipe.write_text(dump_yaml(_recipe(path, shape)), encoding="utf-8")
    for line in metrics(shape):
        run.append_metrics(line)
    run.evaluation.write_text(to_json(evaluation(path, shape)), encoding="utf-8")
    if shape.gated:
        run.gate_results.write_text(to_json(gates(shape)), encoding="utf-8")
    run.write_lines(run.answers, answer_lines(answers(shape)))
    return run


def metrics(shape: Shape) -> list[dict[str, Any]]:
    noise = random.Random(shape.seed)
    lines: list[dict[str, Any]] = []
    for step in range(0, shape.steps + 1, 5):
        loss, kl = _loss_at(shape, step), _kl_at(shape, step)
        if shape.every and step % shape.every == 0:
            lines.append(
                {
                    "stage": "training",
                    "step": step,
                    "eval_loss": loss,
                    "eval_kl": kl,
                    "eval_top1_agreement": math.exp(-1.4 * kl),
                }
            )
        if step:
            lines.append(
                {
                    "stage": "training",
                    "step": step,
                    "loss": loss * noise.uniform(0.75, 1.15),
                    "grad_norm": noise.uniform(0.2, 2),
                    "learning_rate": 3e-3 * (1 - step / shape.steps),
                    "epoch": step * 4 / 1200,
                }
            )
    return lines


def gates(shape: Shape) -> list[GateResult]:
    found = []
    for layer in range(shape.layers):
        for number, (kinds, dim) in enumerate(INPUTS):
            noise = random.Random(f"{shape.seed} {layer} {number}")
            depth = layer / max(shape.layers - 1, 1)
            top = math.exp(noise.gauss(3.2 + 2.2 * depth - 0.8 * (number == 1), 0.4))
            quotients = sorted(top * math.exp(-9 * (i / 110) ** 0.6 + noise.gauss(0, 0.15)) for i in range(110))[::-1]
            found.append(
                GateResult(
                    modules=[f"model.layers.{layer}.{kind}" for kind in kinds],
                    dim=dim,
                    gate_lambda=GATE_LAMBDA,
                    penalty=0.5,
                    heldout_penalty=1.75,
                    quotients=quotients,
                    values=[quotient / (quotient + GATE_LAMBDA) for quotient in quotients],
                    complement_quotient=0.9 + 0.2 * depth,
                    complement_value=(0.9 + 0.2 * depth) / (0.9 + 0.2 * depth + GATE_LAMBDA),
                )
            )
    return found


def layers(shape: Shape) -> list[LayerResult]:
    found = []
    for layer in range(shape.layers):
        for number, (kinds, _) in enumerate(INPUTS):
            for kind in kinds:
                noise = random.Random(f"{shape.seed} {layer} {kind}")
                depth = layer / max(shape.layers - 1, 1)
                task = math.exp(noise.gauss(-4.5 + 1.6 * depth + 0.5 * (number == 3), 0.35))
                own = task * (0.03 if shape.gated else 0.5) * math.exp(noise.gauss(0, 0.5))
                found.append(
                    LayerResult(
                        name=f"model.layers.{layer}.{kind}",
                        drift={TextKind.GENERATED: own, "task": task},
                        predicted=(
                            {
                                TextKind.GENERATED: own * math.exp(noise.gauss(0, 0.2)),
                                "task": task * math.exp(noise.gauss(0, 0.12)),
                            }
                            if shape.gated
                            else {}
                        ),
                        energy_kept=(
                            {"a": 0.02 + 0.1 * depth * noise.uniform(0.6, 1.4), "b": noise.uniform(0.3, 0.8)}
                            if shape.gated
                            else {}
                        ),
                        update_norm=noise.uniform(0.5, 2) * (1 + depth),
                    )
                )
    return found


def evaluation(path: Path, shape: Shape) -> Evaluation:
    kl = shape.kl_scale
    task = PairedChange(
        _around(BASE_LOSS, 0.05), _around(shape.final_loss, 0.006), _around(shape.final_loss - BASE_LOSS, 0.05)
    )
    texts = [TextResult("task", "task", 96, 3021, task, _around(2.61, 0.05), _around(0.412, 0.02))]
    for name, factor in (("generated text", 1.0), ("generated text, cut", CUT)):
        rise = PairedChange(
            _around(3.02, 0.09), _around(3.02 + factor * kl * 0.97, 0.09), _around(factor * kl * 0.97, 0.02)
        )
        agreed = _around(math.exp(-1.4 * kl * factor), 0.012)
        texts.append(TextResult(name, TextKind.GENERATED, 32, 3712, rise, _around(factor * kl, 0.1 * kl), agreed))
    for name, base, factor in (("prose", 3.785, 0.115), ("code", 1.913, 1.54)):
        rise = PairedChange(_around(base, 0.12), _around(base + factor * kl, 0.12), _around(factor * kl, 0.009))
        texts.append(
            TextResult(name, "general", 48, 11904, rise, _around(0.3 * kl, 0.03 * kl), _around(1 - 0.3 * kl, 0.01))
        )
    score = ScoreResult("exact_match", 96, PairedChange(_same(0.0), _around(0.729, 0.09), _around(0.729, 0.09)))
    harness = [
        HarnessResult("arc_easy", "acc,none", 570, 0.584, 0.021, 0.579, 0.021, 0.008),
        HarnessResult("wikitext", "word_perplexity,none", 62, 21.4, None, 22.0, None, None, higher_is_better=False),
    ]
    return Evaluation(
        tuned=path.name,
        base="demo/SmolLM2-135M-Instruct",
        held="4 bits (nf4), computing in bfloat16 on the CPU",
        texts=texts,
        score=score if shape.score else None,
        layers=layers(shape),
        harness=harness if shape.harness else [],
    )


def answers(shape: Shape) -> list[AnswerResult]:
    found = []
    days = ["Tuesday", "Friday", "Sunday", "Monday"]
    for number in range(12):
        day, right = days[number % 4], number % 4 != 3
        reference = f'{{"name":"Gustav Ferrari","guests":{number + 1},"day":"{day}","time":"14:30","seating":"inside"}}'
        found.append(
            AnswerResult(
                kind="task",
                prompt=[
                    {"role": "system", "content": "Turn the booking into JSON."},
                    {
                        "role": "user",
                        "content": f"We will be {number + 1} on {day}. Around 2:30 pm indoors? G. Ferrari.",
                    },
                ],
                reference=reference,
                base="I'm so excited to share a moment with you. In 2023, "
                + f"I'll be 2 on {day}. " * (8 + 12 * number),
                tuned=reference if right else reference.replace("14:30", "12:30"),
                base_score=0.0,
                tuned_score=float(right),
            )
        )
    for prompt in ("Why is the sky blue?", "Write two lines about the sea.", "What is 17 + 25?"):
        found.append(
            AnswerResult(
                kind="general",
                prompt=prompt,
                reference=None,
                base="Because of something called Rayleigh scattering, in which short waves are scattered more.",
                tuned="The sky is blue because of Rayleigh scattering: short waves are scattered more than long ones.",
            )
        )
    return found


def _manifest(shape: Shape) -> dict[str, Any]:
    gib = 1 << 30
    stages = [
        ("loading the model in 4 bits", 9.4, 0.9),
        ("sampling text from the base model", 60.2, 1.6),
        ("measuring the base model", 31.0, 1.4),
        ("statistics of both texts", 48.1, 1.9),
        ("training", 276.3, 3.2),
        ("comparing losses and predictions", 40.7, 1.8),
        ("answering, as base and as tuned", 22.5, 1.5),
    ]
    return {
        "status": "complete",
        "started": "2026-11-24T20:14:03+00:00",
        "seeds": {"training": 0, "proxy": 0},
        "versions": {"python": "3.12.7", "folora-q": "0.2.0", "torch": "2.13.0", "peft": "0.21.2"},
        "data": {"train": {"rows": 1200, "tokens": 61204}, "heldout": {"rows": 96, "tokens": 5012}},
        "data_sha256": {"recipes/demo/train.jsonl": "9f2c" * 16, "recipes/demo/heldout.jsonl": "07ab" * 16},
        "hardware": "the CPU: no GPU was found",
        "model": {"name": "demo/SmolLM2-135M-Instruct", "revision": None, "fingerprint": shape.fingerprint},
        "stages": [
            {"title": title, "seconds": seconds, "peak_bytes": int(peak * gib), "memory": "host"}
            for title, seconds, peak in stages
            if shape.gated or "statistics" not in title
        ],
    }


def _recipe(path: Path, shape: Shape) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": "demo/SmolLM2-135M-Instruct", "bnb_4bit_quant_type": "nf4"},
        "adapter": {"r": 16, "lora_alpha": 16.0},
        "data": {"train_dataset": ["recipes/demo/train.jsonl"], "eval_dataset": ["recipes/demo/heldout.jsonl"]},
        "gate": {"enabled": shape.gated, "rule": "step", "gate_lambda": GATE_LAMBDA, "rank": 64},
        "training": {"output_dir": str(path), "learning_rate": 3e-3 if shape.gated else 2e-4, "max_steps": shape.steps},
        "evaluation": {"metric": "exact_match", "steps": shape.every},
    }


def _loss_at(shape: Shape, step: int) -> float:
    """Falls by equal factors towards the end, and a little slower at first."""
    share = (step / shape.steps) ** 0.7
    return BASE_LOSS * (shape.final_loss / BASE_LOSS) ** share


def _kl_at(shape: Shape, step: int) -> float:
    return OWN_MEAN * shape.kl_scale * (step / shape.steps) ** 0.8


def _around(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def _same(value: float) -> Interval:
    return Interval(value, value, value)
