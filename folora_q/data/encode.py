"""Examples as tokens and labels: rendered by the chat template, marked, and cut to length.

How an assistant's turns are marked, first match wins:

1. by `{% generation %}` marks, the template's own or those of TRL's training variant of it (its assistant_only_loss);
2. by rendering: if a conversation up to a turn is the beginning of the whole, what comes after the prompt of that turn
   is the assistant's, with the token that ends it;
3. by rendering, turn by turn: where a template rewrites earlier turns, each turn becomes a sequence of its own, with
   all before it as its prompt (TRL's prompt and completion).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from folora_q.data.formats import Chat, Completion, Example, Message, Text
from folora_q.data.rows import RowError
from folora_q.data.tokens import IGNORED, TEMPLATE_ERRORS
from folora_q.errors import UserError

Span = tuple[int, int]
PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class Encoded:
    """One sequence: token ids, and labels that are IGNORED where nothing is learned."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens are learned; the first of a sequence never is, since nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


class Encoder:
    """Turns examples into tokens with one tokenizer and its chat template.

    Args:
        tokenizer: fast; its `chat_template` is the one to use.
        assistant_only_loss: chats are learned where the assistant speaks, otherwise everywhere.
        completion_only_loss: completions are learned alone, otherwise with their prompts.
        template_name: what messages call the chat template.

    Attributes:
        marking: how the assistant's turns are marked, for people.
        end_of_turn: the token that ends an assistant's turn, or None before a chat template was needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        template_name: str = "the model's chat template",
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell where in the text a token stands",
                "use a model with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.assistant_only_loss = assistant_only_loss
        self.completion_only_loss = completion_only_loss
        self.template_name = template_name
        self.marking: str | None = None
        self.end_of_turn: int | None = None
        self._template: str | None = None
        self._marked = False

    def key(self) -> str:
        """All that the tokens depend on besides the examples."""
        tokenizer = self.tokenizer
        tells_the_date = self._template is not None and "strftime_now" in self._template
        return json.dumps(
            [
                tokenizer.backend_tokenizer.to_str(),
                tokenizer.chat_template,
                self._template,
                date.today().isoformat() if tells_the_date else None,
                sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
                self.assistant_only_loss,
                self.completion_only_loss,
            ]
        )

    def prepare_chats(self) -> None:
        """Choose how turns are marked, and find the token that ends one. Chats need it first.

        Raises:
            UserError: there is no template, it is no valid one, or a turn that it renders has no end.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(
                "the data are chats, but this model's tokenizer has no chat template",
                "use the instruct version of the model, set data.chat_template (chatml, alpaca, ...), or give rows "
                "with `prompt` and `completion`",
            )
        self._template = template["default"] if isinstance(template, dict) else template
        try:
            self.marking = "the chat template's own marks"
            self._marked = has_generation_markers(self._template)
            if not self._marked:
                self.marking = "rendering with and without them"
                self._use_trls_variant(self._render(PROBE))
            self._find_end()
        except TemplateSyntaxError as error:
            raise UserError(f"{self.template_name} is not valid Jinja: {error.message}, line {error.lineno}") from None
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{self.template_name} fails on a question and an answer: {_sentence(error)}") from None

    def __call__(self, example: Example) -> list[Encoded]:
        """The sequences of one example; a chat may need several.

        Raises:
            RowError: the chat template, or the tokenizer, refuses it.
            UserError: the chat template cannot mark what the assistant says.
        """
        try:
            match example:
                case Chat():
                    return self._chat(example)
                case Completion():
                    text = self._ended(example.prompt + example.completion)
                    start = len(example.prompt) if self.completion_only_loss else 0
                case Text():
                    text, start = self._ended(example.text), 0
            return [self._tokens(text, [(start, len(text))])]
        except TEMPLATE_ERRORS as error:
            raise RowError(example.where, f"it cannot be rendered: {_sentence(error)}") from None

    def _chat(self, chat: Chat) -> list[Encoded]:
        messages = chat.messages
        if not self.assistant_only_loss:
            text = self._render(messages)
            start = len(_common(self._render(messages[: chat.context], prompt=True), text)) if chat.context else 0
            return [self._tokens(text, [(start, len(text))], special=False)]
        if self._marked:
            return [self._by_marks(chat)]
        turns = [
            index for index in range(chat.context, len(messages)) if messages[index]["role"] == "assistant" and index
        ]
        text = self._render(messages)
        spans = [self._span(messages, index, text) for index in turns]
        if all(spans):
            return [self._tokens(text, spans, special=False)]
        encoded = []
        for index in turns:
            text = self._render(messages[: index + 1])
            span = self._span(messages[: index + 1], index, text)
            if span is None:
                raise UserError(
                    f"{self.template_name} cannot mark what the assistant says: the prompt of a turn is not its "
                    f"beginning ({chat.where})",
                    "set data.chat_template to one that can (chatml, llama3, ...) or to a .jinja file with "
                    "{% generation %} marks, or set training.assistant_only_loss: false",
                )
            encoded.append(self._tokens(text, [span], special=False))
        return encoded

    def _span(self, messages: list[Message], index: int, whole: str) -> Span | None:
        """Where in the rendered whole the assistant's turn at `index` stands, with its end, if that can be told."""
        before = self._render(messages[:index], prompt=True)
        until = whole if index == len(messages) - 1 else self._render(messages[: index + 1])
        fits = len(before) < len(until) and whole.startswith(before) and whole.startswith(until)
        return (len(before), len(until)) if fits else None

    def _by_marks(self, chat: Chat) -> Encoded:
        output = self.tokenizer.apply_chat_template(
            chat.messages, chat_template=self._template, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = output["input_ids"], output["assistant_masks"]
        known = 0
        if chat.context:
            prompt = self._render(chat.messages[: chat.context], prompt=True)
            known = len(_common(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], ids))
        labels = [
            token if marked and position >= known else IGNORED
            for position, (token, marked) in enumerate(zip(ids, mask, strict=True))
        ]
        return Encoded(list(ids), labels)

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )

    def _tokens(self, text: str, spans: Sequence[Span], special: bool = True) -> Encoded:
        """Tokens of a text; those that reach into a span are learned."""
        output = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, places = list(output["input_ids"]), output["offset_mapping"]
        labels = [
            token if any(start < end and begin < end and start < finish for begin, finish in spans) else IGNORED
            for token, (start, end) in zip(ids, places, strict=True)
        ]
        first = self.tokenizer.bos_token_id
        if first is not None and ids[:2] == [first, first]:  # the text brings its own
            ids, labels = ids[1:], labels[1:]
        return Encoded(ids, labels)

    def _ended(self, text: str) -> str:
        """Plain text with the token that ends it, once."""
        end = self.tokenizer.eos_token
        if end is None:
            raise UserError("this tokenizer has no end token, so a model could not learn where a text ends")
        return text if text.endswith(end) else text + end

    def _use_trls_variant(self, rendered: str) -> None:
        try:
            variant = get_training_chat_template(self.tokenizer)
        except (ValueError, *TEMPLATE_ERRORS):
            return  # TRL has none
        if variant is None:
            return
        own, self._template = self._template, variant
        if self._render(PROBE) != rendered:
            self._template = own  # it would teach other text than the model is asked with
            return
        self._marked, self.marking = True, "TRL's training variant of the chat template"

    def _find_end(self) -> None:
        """The last learned token that is no white space; it must be one that generation can stop at."""
        [encoded] = self._chat(Chat("a question and an answer", PROBE))
        added = set(self.tokenizer.get_added_vocab().values())
        learned = [label for label in encoded.labels if label != IGNORED and self.tokenizer.decode([label]).strip()]
        if not learned or learned[-1] not in added:
            raise UserError(
                f"{self.template_name} ends the assistant's turn with no token of its own, so it would not be learned",
                "the template's end of a turn, such as <|im_end|>, must be in the tokenizer, and inside the "
                "{% generation %} marks where there are any; or set data.chat_template",
            )
        self.end_of_turn = learned[-1]


def _common(one: Sequence, other: Sequence) -> Sequence:
    """The longest beginning that both share."""
    length = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    return one[:length]


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
