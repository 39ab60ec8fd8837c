"""Stream the answers of a model, and keep one conversation with it. Prints nothing.

Prompts are rendered as in the evaluation, so a greedy answer equals the one in answers.jsonl.
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

# Below this, decoding is greedy: the most likely token has nearly all the probability, and the division may overflow.
MIN_TEMPERATURE = 1e-3
# What the bytes of an incomplete character are decoded to.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; all others are from the model's generation config. Temperature 0 is greedy.

    Attributes:
        think: whether the model may think first; if not, the place for thoughts in its chat template is left empty.
    """

    temperature: float = 0.7
    max_new_tokens: int = 512
    think: bool = True


@dataclass
class Chatter:
    """A model that answers, with and without its adapter.

    Attributes:
        name: as the user gave it.
        origin: what was loaded, for display.
        stops: the tokens that end an answer.
        base: a second model to compare with, if there is no adapter to switch off.
        system: the system prompt that it was trained with, if known and always the same.
        thoughtless: whether it is known to be trained on answers with empty thoughts only.
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
        """The renderer of its conversations."""
        return Renderer(self.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template; without one it continues plain text."""
        return self.tokenizer.chat_template is not None

    @property
    def can_compare(self) -> bool:
        """Whether there is a base that can answer too."""
        return self.base is not None or isinstance(self.model, PeftModel)

    def reply(
        self, messages: Sequence[Message], base: bool, settings: Sampling, written: list[int] | None = None
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is generated. Closing the generator stops it.

        Args:
            messages: the conversation, ending with the user's turn, which alone is continued without a chat template.
            base: answer with the base model.
            written: a list to which the answer's tokens are added.

        Raises:
            UserError: there is no base, the chat template rejects the conversation, or it is longer than the model's
                context.
            RunError: the device runs out of memory.
        """
        if base and not self.can_compare:
            raise nothing_to_compare(self.name)
        ids = self._prompt(messages, settings.think)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - len(ids))
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the context of {self.name} is {context:,}",
                "start a new one with /reset",
            )
        sampled = settings.temperature >= MIN_TEMPERATURE
        how: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": room}
        # transformers warns of sampling settings that the model's configuration leaves in greedy decoding.
        how |= {"temperature": settings.temperature} if sampled else dict.fromkeys(("temperature", "top_p", "top_k"))
        return self._stream(ids, base, how, [] if written is None else written)

    def remembered(self, messages: Sequence[Message], settings: Sampling, written: Sequence[int], text: str) -> Message:
        """Return an answer as a turn, its thought separate, since templates drop the thoughts of earlier turns."""
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
                    f"the chat template of {self.name} rejects this conversation ({roles}): {first_line(error)}",
                    "many templates accept no system turn: leave out --system" if "system" in roles else None,
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
                # One at a time: an abandoned answer may still generate its last token, with the adapter off.
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
                    "start a new one, or lower --max-new-tokens",
                ) from failures[0]
            raise failures[0]


class Conversation:
    """One model's conversation: it remembers its questions and its own answers."""

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
        """Yield the answer in pieces. If it is interrupted, the part so far is remembered."""
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
    """Stops the generation when its reader has closed it."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class Pieces(TextIteratorStreamer):
    """Streams text as soon as its characters are complete.

    The parent class waits for a space, and restarts decoding after each line, where many tokenizers drop the first
    space. Here each token is decoded together with those of the previous piece.
    """

    def __init__(self, tokenizer: Tokenizer, written: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.written = [] if written is None else written  # all tokens, for the caller
        self._tokens: list[int] = []  # tokens of the last piece, and those not yet written
        self._written = 0  # number of those that are written

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
        """Release the reader, also if the generation failed."""
        self.text_queue.put(self.stop_signal)

    def _unwritten(self) -> str:
        before = self._decoded(self._tokens[: self._written])
        return self._decoded(self._tokens)[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return cast(str, self.tokenizer.decode(tokens, **self.decode_kwargs))
