"""Stream the answers of a model, and keep one conversation with it. Nothing prints.

Prompts are made as the evaluation makes them, so a greedy answer is the one that stands in answers.jsonl.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event, Lock, Thread
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.rendering import Renderer, RenderError
from folora_q.data.thoughts import ThoughtSyntax
from folora_q.data.tokens import TEMPLATE_ERRORS, text_ids
from folora_q.data.turns import THOUGHT, Message
from folora_q.errors import RunError, UserError, first_line
from folora_q.models.adapters import adapter_off
from folora_q.targets.load import nothing_to_compare

# Below this, sampling is greedy: the most likely token has all of the probability, if the division can be made at all.
MIN_TEMPERATURE = 1e-3
# What bytes that are no whole character yet are decoded to.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: temperature 0 is greedy; what is not said here is as the model's authors set it.

    Attributes:
        think: whether it may think first; otherwise the place that its chat template has for thoughts is left empty.
    """

    temperature: float = 0.7
    max_new_tokens: int = 512
    think: bool = True


@dataclass
class Chatter:
    """A model that answers, with its adapter and without.

    Attributes:
        name: as it was asked for.
        origin: what was loaded, for people.
        stops: the tokens that end an answer.
        base: the model to compare with, where the model is no adapter on one.
        system: the system prompt that it was trained with, where that is known and always the same.
        thoughtless: whether it is known to be trained on answers without thoughts, whose place was given.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: Tokenizer
    name: str
    origin: str
    stops: list[int]
    base: PreTrainedModel | None = None
    system: str | None = None
    thoughtless: bool = False
    _turn: Lock = field(default_factory=Lock, repr=False)

    @cached_property
    def renderer(self) -> Renderer:
        """What renders its conversations."""
        return Renderer(self.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether it takes conversations; without a chat template it continues plain text."""
        return self.tokenizer.chat_template is not None

    @property
    def can_compare(self) -> bool:
        """Whether there is a base that can answer too."""
        return self.base is not None or isinstance(self.model, PeftModel)

    def reply(
        self, messages: Sequence[Message], base: bool, settings: Sampling, written: list[int] | None = None
    ) -> Generator[str, None, None]:
        """Answer, piece by piece as it is written. Closing the iterator ends the writing.

        Args:
            messages: the conversation, the user's turn last; without a chat template that turn alone is continued.
            base: answer as the base does.
            written: gets the answer's tokens.

        Raises:
            UserError: there is no base, the chat template does not take the conversation, or it is longer than the
                model's context.
            RunError: the device's memory does not hold it.
        """
        if base and not self.can_compare:
            raise nothing_to_compare(self.name)
        ids = self._prompt(messages, settings.think)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - len(ids))
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the context of {self.name} is {context:,}",
                "begin a new one: /reset forgets what was said",
            )
        sampled = settings.temperature >= MIN_TEMPERATURE
        how: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": room}
        # Greedy with settings of sampling left over from the model's configuration would only be warned of.
        how |= {"temperature": settings.temperature} if sampled else dict.fromkeys(("temperature", "top_p", "top_k"))
        return self._stream(ids, base, how, [] if written is None else written)

    def remembered(self, messages: Sequence[Message], settings: Sampling, written: Sequence[int], text: str) -> Message:
        """An answer as a turn of its conversation, apart from its thought, since templates drop those of the past."""
        turn: Message = {"role": "assistant", "content": text}
        if not self.has_template or not self.renderer.thinks:
            return turn
        said = ThoughtSyntax(self.renderer).split(written, self.renderer.prompt(messages, think=settings.think))
        return turn | {"content": said.answer} | ({THOUGHT: said.thought} if said.thought else {})

    def _prompt(self, messages: Sequence[Message], think: bool = True) -> list[int]:
        said = messages[-1]["content"]
        if not self.has_template:
            ids = text_ids(self.tokenizer, said)
        else:
            try:
                ids = self.renderer.ids(self.renderer.prompt(messages, think=think))
            except RenderError as error:
                raise UserError(f"the chat template of {self.name} {error.reason}", "ask with --think") from error
            except TEMPLATE_ERRORS as error:
                roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
                raise UserError(
                    f"the chat template of {self.name} does not take this conversation ({roles}): {first_line(error)}",
                    "many templates take no system turn: leave out --system" if "system" in roles else None,
                ) from error
        if not ids:
            raise UserError("there is nothing to continue: the text has no tokens")
        return ids

    def _stream(
        self, ids: list[int], base: bool, how: dict[str, Any], written: list[int]
    ) -> Generator[str, None, None]:
        stop, failures = Event(), []
        streamer = Pieces(self.tokenizer, written, skip_prompt=True, skip_special_tokens=True)
        model = self.base if base and self.base is not None else self.model
        inputs = torch.tensor([ids], device=model.device)
        pad = self.tokenizer.pad_token_id

        def write() -> None:
            try:
                bare = adapter_off(model) if base and isinstance(model, PeftModel) else nullcontext()
                # One at a time: an answer that was given up may still be at its last token, without its adapter.
                with self._turn, bare:
                    cast(Any, model).generate(  # of a mixin that PreTrainedModel does not declare
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                        eos_token_id=self.stops or None,
                        pad_token_id=pad if pad is not None else (self.stops or [0])[0],
                        **how,
                    )
            except BaseException as error:  # raised again where the answer is read
                failures.append(error)
            finally:
                streamer.finish()

        thread = Thread(target=write, name="folora-q-chat", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failures:
            if isinstance(failures[0], torch.OutOfMemoryError):
                raise RunError(
                    f"out of memory on {model.device} at a conversation of {len(ids):,} tokens",
                    "begin a new one, or let it write less: --max-new-tokens",
                ) from failures[0]
            raise failures[0]


class Conversation:
    """One model's side of a talk: it remembers what it was asked and what it answered itself."""

    def __init__(self, chatter: Chatter, base: bool, settings: Sampling, system: str | None = None) -> None:
        if system is not None and not chatter.has_template:
            raise UserError(
                f"{chatter.name} has no chat template, so it takes no system prompt", "write it before the question"
            )
        self.chatter, self.base, self.settings = chatter, base, settings
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = list(self._start)

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces. What was said until then is remembered if it is cut short, too."""
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        written: list[int] = []
        try:
            with closing(self.chatter.reply(asked, self.base, self.settings, written)) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:
            if answer.strip():
                self.messages = [*asked, self.chatter.remembered(asked, self.settings, written, answer)]


class _Stopped(StoppingCriteria):
    """Ends the writing when nobody reads any more."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class Pieces(TextIteratorStreamer):
    """Text as soon as its characters are whole.

    The parent waits for a space, and after each line decodes anew, where many tokenizers drop the first space. Here a
    token is decoded behind those of the piece before it.
    """

    def __init__(self, tokenizer: Tokenizer, written: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.written = [] if written is None else written  # all tokens, for who passed a list
        self._tokens: list[int] = []  # those of the last piece, and what is not written yet
        self._written = 0  # so many of them are

    def put(self, value: torch.Tensor) -> None:
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        tokens = value.reshape(-1).tolist()
        self.written += tokens
        self._tokens += tokens
        text = self._unwritten()
        if text and not text.endswith(INCOMPLETE):
            self._tokens, self._written = self._tokens[self._written :], len(self._tokens) - self._written
            self.on_finalized_text(text)

    def end(self) -> None:
        if text := self._unwritten():
            self.on_finalized_text(text)
        self._tokens, self._written = [], 0

    def finish(self) -> None:
        """Let the reader go, also where generation failed before its end."""
        self.text_queue.put(self.stop_signal)

    def _unwritten(self) -> str:
        before = self._decoded(self._tokens[: self._written])
        return self._decoded(self._tokens)[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, **self.decode_kwargs))
