"""Sample text from the base model, which shows what it can do before training.

Source: FoLoRA (arXiv 2606.00132) Appendix B.4 for the decoding mixture and the filters; Magpie (arXiv 2406.08464) for
the user turns of chats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.batch_splitting import BatchSplitter
from folora_q.data.rendering import Renderer
from folora_q.data.tokens import TEMPLATE_ERRORS, decoded, end_tokens, generation_inputs, until_end
from folora_q.distributed.processes import ONE, Processes
from folora_q.errors import RunError, UserError, first_line
from folora_q.recipe.schema import ProxySection

# The paper's mixture: share of the samples, and their decoding settings.
PAPER_MIXTURE = (
    (0.7, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
    (0.2, {"temperature": 1.0, "top_p": 0.95, "top_k": 0}),
    (0.1, {"temperature": 1.2, "top_p": 0.98, "top_k": 50}),
)
PLAIN = ((1.0, PAPER_MIXTURE[0][1]),)
# Shorter samples say little about the model, and their crops nothing.
MIN_SAMPLE_TOKENS = 16
# With filters on, a model that mostly writes degenerate text must not sample forever.
MAX_ROUNDS = 20


@dataclass(frozen=True)
class ProxySample:
    """One sampled sequence: all its tokens, from the beginning-of-text token if the model has one."""

    ids: list[int]
    source: str  # bos | chat


@dataclass(frozen=True)
class SamplingContext:
    """What sampling depends on besides its settings.

    Attributes:
        on_progress: called with the number of new samples.
        splitter: splits batches if memory runs out, after which the same seed gives other text; the default raises.
        processes: share the model; if it is sharded, they sample the same text together.
    """

    on_progress: Callable[[int], None] = lambda count: None
    splitter: BatchSplitter = field(default_factory=lambda: BatchSplitter("sampling", enabled=False))
    processes: Processes = ONE


def sample_proxy(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    section: ProxySection,
    context: SamplingContext | None = None,
) -> list[ProxySample]:
    """Draw `num_samples + num_heldout_samples` sequences from the model without an adapter.

    The random state of the process does not change. The same seed, settings and machine give the same text.

    Raises:
        UserError: the source needs chats and there is no chat template.
        RunError: too little of the sampled text passes the filters.
    """
    context = context or SamplingContext()
    sampler = _Sampler(model, tokenizer, section, context)
    wanted = section.num_samples + section.num_heldout_samples
    sources = {"bos": ["bos"], "chat": ["chat"], "mixed": ["bos", "chat"]}[section.source]
    device = next(model.parameters()).device
    samples: list[ProxySample] = []
    seen: set[str] = set()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(section.seed)
        for index, source in enumerate(sources):
            share = wanted // len(sources) + (index < wanted % len(sources))
            target = len(samples) + share
            for _ in range(MAX_ROUNDS):
                missing = target - len(samples)
                if missing <= 0:
                    break
                for drawn in sampler.draw(source, missing):
                    passed = [ids for ids in drawn if len(ids) >= MIN_SAMPLE_TOKENS and _passes(ids, section, seen)]
                    samples += [ProxySample(ids, source) for ids in passed]
                    context.on_progress(len(passed))
            if len(samples) < target:
                raise RunError(
                    f"after {MAX_ROUNDS} rounds only {len(samples)} of {wanted} sampled texts passed the filters",
                    "set proxy.filters: false, or use another proxy.source",
                )
    return _interleaved(samples)


def start_token(tokenizer: Tokenizer) -> int:
    """Return the token that texts begin with: BOS, or `<|endoftext|>` for models without one (Qwen), or else EOS.

    Raises:
        UserError: the tokenizer has none of them.
    """
    if isinstance(tokenizer.bos_token_id, int):
        return tokenizer.bos_token_id
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if isinstance(separator, int) and separator != tokenizer.unk_token_id:
        return separator
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise UserError("this tokenizer has no BOS, <|endoftext|> or EOS token, so there is nothing to sample from")


def chat_openings(tokenizer: Tokenizer) -> str:
    """Return what the chat template renders before the user's first words.

    Raises:
        UserError: there is no template, it fails, or it does not render the user's text.
    """
    marker = "folora-q user turn"
    if tokenizer.chat_template is None:
        raise UserError("proxy.source needs chats, but this model has no chat template", "set proxy.source=bos")
    rendered = _render(Renderer(tokenizer), marker)
    opening, found, _ = rendered.partition(marker)
    if not found:
        raise UserError("this model's chat template does not render the user's text", "set proxy.source=bos")
    return opening


@dataclass(frozen=True)
class _Sampler:
    """A model that text is sampled from, with its tokenizer and the settings of sampling."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    section: ProxySection
    context: SamplingContext

    def draw(self, source: str, count: int) -> Iterator[list[list[int]]]:
        """Sample `count` sequences from one source in batches, by the shares of the decoding mixture."""
        mixture = PAPER_MIXTURE if self.section.decoding == "paper" else PLAIN
        left = count
        for position, (share, decoding) in enumerate(mixture):
            amount = left if position == len(mixture) - 1 else round(count * share)
            left -= amount

            def draw(start: int, stop: int, decoding: dict[str, float] = decoding) -> list[list[int]]:
                if source == "bos":
                    prompts = [[start_token(self.tokenizer)]] * (stop - start)
                    return self._continue(prompts, self.section.max_new_tokens, decoding)
                return self._draw_chats(stop - start, decoding)

            yield from self.context.splitter.over(amount, self.section.max_new_tokens, draw, self.section.batch_size)

    def _draw_chats(self, count: int, decoding: dict[str, float]) -> list[list[int]]:
        """Let the model write a user turn after the template's opening, and then answer it."""
        tokenizer, most = self.tokenizer, self.section.max_new_tokens
        opening = tokenizer(chat_openings(tokenizer), add_special_tokens=False)["input_ids"]
        turns = self._continue([opening] * count, most // 2, decoding)
        users = [decoded(tokenizer, turn[len(opening) :], skip_special_tokens=True).strip() for turn in turns]
        renderer = Renderer(tokenizer)
        prompts = [renderer.ids(_render(renderer, user, prompt=True)) for user in users if user]
        return self._continue(prompts, most - most // 2, decoding) if prompts else []

    def _continue(self, prompts: list[list[int]], max_new_tokens: int, decoding: dict[str, float]) -> list[list[int]]:
        """Return the prompts with the model's continuations, up to and including the end token."""
        inputs = generation_inputs(prompts, self.tokenizer, next(self.model.parameters()).device)
        settings = {"do_sample": True, "max_new_tokens": max_new_tokens, **decoding}
        output = self.context.processes.generate(self.model, **inputs, **settings)
        ends, width = end_tokens(self.model), inputs["input_ids"].shape[1]
        return [prompt + until_end(row[width:].tolist(), ends) for prompt, row in zip(prompts, output, strict=True)]


def _render(renderer: Renderer, user: str, prompt: bool = False) -> str:
    """Render a chat of one turn, with the generation prompt if `prompt`."""
    try:
        return renderer.render([{"role": "user", "content": user}], prompt=prompt)
    except TEMPLATE_ERRORS as error:
        raise UserError(
            f"this model's chat template fails on a user's turn: {first_line(error)}", "set proxy.source=bos"
        ) from error


def _passes(ids: list[int], section: ProxySection, seen: set[str]) -> bool:
    """Apply the paper's filters: no duplicate, 32 tokens or more, no run of 20 equal ones, varied tokens, 4-grams."""
    if not section.filters:
        return True
    digest = hashlib.sha1(str(ids).encode(), usedforsecurity=False).hexdigest()
    longest_run = run = 1
    for before, token in zip(ids, ids[1:], strict=False):
        run = run + 1 if token == before else 1
        longest_run = max(longest_run, run)
    four_grams = list(zip(*(ids[offset:] for offset in range(4)), strict=False))
    good = (
        digest not in seen
        and len(ids) >= 32
        and longest_run < 20
        and not (len(ids) >= 128 and len(set(ids)) / len(ids) < 0.12)
        and not (len(ids) >= 256 and len(set(four_grams)) / len(four_grams) < 0.25)
    )
    seen.add(digest)
    return good


def _interleaved(samples: list[ProxySample]) -> list[ProxySample]:
    """Alternate the sources, so that a held-out tail has the same mixture as the rest."""
    by_source: dict[str, list[ProxySample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
    queues = sorted(by_source.values(), key=len, reverse=True)
    return [queue[i] for i in range(len(queues[0])) for queue in queues if i < len(queue)]
