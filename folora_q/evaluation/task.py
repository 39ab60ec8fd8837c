"""Does the model do the task: greedy answers to held-out prompts, compared with their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.formats import Chat, Completion
from folora_q.data.tokens import prompt_ids


@dataclass(frozen=True)
class Answer:
    """One greedy answer beside its reference."""

    prompt: str
    answer: str
    reference: str

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.reference.strip()


def answer_all(
    model: PeftModel,
    tokenizer: Tokenizer,
    examples: Sequence[Chat | Completion],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda examples: None,
) -> list[Answer]:
    """Greedy answers, in the order of the examples."""
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            prompt = examples[index].prompt
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            answers[index] = Answer(asked, text, examples[index].reference)
        on_progress(len(chosen))
    return [answers[index] for index in range(len(examples))]


def exact_match(answers: Sequence[Answer]) -> float:
    """The share of answers that equal their reference after trimming white space."""
    return sum(answer.correct for answer in answers) / len(answers)
