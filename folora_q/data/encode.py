"""Encode examples as tokens and labels: rendered by the chat template, masked, and cut to length.

Each trained assistant turn is what the model's own template (the one that is saved) renders for it as the last turn of
its conversation, after the generation prompt. Turns whose texts are prefixes of each other share a sequence; where a
template rewrites earlier turns, each turn has its own sequence. `{% generation %}` marks in the template narrow what is
trained. TRL's training variants of templates are not used: they render different text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from typing import Any, cast

from jinja2 import TemplateSyntaxError
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl.chat_template_utils import has_generation_markers

from folora_q.data.completeness import lost_part
from folora_q.data.examples import Chat, Completion, Example, Labelled, Preference, Text, with_answers
from folora_q.data.pieces import Encoded, Piece, PieceTokenizer, Span, inside, labels_of
from folora_q.data.rendering import END_HINT, RenderedTurn, Renderer, RenderError, common_length
from folora_q.data.rows import RowError
from folora_q.data.tokens import IGNORED, TEMPLATE_ERRORS, added_at_the_start, decoded
from folora_q.data.tools import Tool
from folora_q.data.turns import THOUGHT, Message
from folora_q.errors import UserError

QUESTION: Message = {"role": "user", "content": "a"}
ANSWER: Message = {"role": "assistant", "content": "b"}
# A template that accepts neither of these accepts no chat that could be trained on.
PROBES: tuple[list[Message], ...] = ([QUESTION, ANSWER], [QUESTION, {**ANSWER, THOUGHT: "c"}])


class Encoder:
    """Encodes examples with one tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer with the chat template to use.
        assistant_only_loss: train only the assistant's turns of chats; otherwise everything.
        completion_only_loss: train only completions; otherwise their prompts too.
        template_name: what messages call the chat template.
        without_thought: `data.without_thought`.

    Attributes:
        renderer: renders chats.
        marking: how the assistant's turns are found, for messages.
        end_of_turn: the token that ends an assistant turn; None before `prepare_chats`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        template_name: str = "the model's chat template",
        without_thought: str = "given",
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where in the text a token is",
                "use a model with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, without_thought)
        self._tokens_of = PieceTokenizer(tokenizer)
        self.assistant_only_loss = assistant_only_loss
        self.completion_only_loss = completion_only_loss
        self.template_name = template_name
        self.marking: str | None = None
        self.end_of_turn: int | None = None

    def key(self) -> str:
        """Return everything besides the examples that the tokens depend on."""
        tokenizer = self.tokenizer
        tells_the_date = self.marking is not None and "strftime_now" in json.dumps(tokenizer.chat_template)
        return json.dumps(
            [
                cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer.to_str(),
                tokenizer.chat_template,
                date.today().isoformat() if tells_the_date else None,
                sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
                self.assistant_only_loss,
                self.completion_only_loss,
                self.renderer.without_thought,
            ]
        )

    def prepare_chats(self) -> None:
        """Check that the template can be used, and find the token that ends a turn; required before encoding chats.

        Raises:
            UserError: there is no template, it is not valid, or it renders no end of a turn.
        """
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the data are chats, but this model's tokenizer has no chat template",
                "use the instruct version of the model, set data.chat_template (chatml, alpaca, ...), or give rows "
                "with `prompt` and `completion`",
            )
        try:
            own = self._marks(PROBES[0])
            self.marking = "rendering with and without them" if own is None else "the chat template's own marks"
            self.end_of_turn = self._end()
        except TemplateSyntaxError as error:
            raise UserError(f"{self.template_name} is not valid Jinja: {error.message}, line {error.lineno}") from None
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{self.template_name} fails on a question and an answer: {_sentence(error)}") from None
        except RenderError as error:
            raise UserError(f"{self.template_name} {error.reason}", error.hint) from None

    def ends_of_turn(self, examples: Iterable[Example]) -> list[int]:
        """Return the tokens at which generation must stop: the end of a turn, and of a tool call if there is any."""
        ends = [] if self.end_of_turn is None else [self.end_of_turn]
        for chat in (example for example in with_answers(examples) if isinstance(example, Chat)):
            calling = [index for index in chat.learned if chat.messages[index].get("tool_calls")]
            if calling:
                try:
                    said = self.renderer.turn(chat.messages, calling[0], chat.tools).said
                except (RenderError, *TEMPLATE_ERRORS):
                    continue  # encoding the row raises this error
                ends.append(self.renderer.ids(said.rstrip())[-1])
                break
        return list(dict.fromkeys(ends))

    def __call__(self, example: Example) -> list[Encoded]:
        """Encode one example; a chat may need several sequences, and a pair is one with the rejected answer in it.

        Raises:
            RowError: the chat template or the tokenizer fails on it, or a part of it would be lost.
        """
        try:
            match example:
                case Chat():
                    return self._chat(example)
                case Completion():
                    text = self._ended(example.prompt + example.completion)
                    start = len(example.prompt) if self.completion_only_loss else 0
                    return [self._document(text, start)]
                case Text():
                    return [self._document(self._ended(example.text), 0)]
                case Preference():
                    return [replace(self._answer(example.chosen), rejected=self._answer(example.rejected))]
                case Labelled():
                    return [replace(self._answer(example.answer), desirable=example.desirable)]
        except TEMPLATE_ERRORS as error:
            raise RowError(example.where, f"it cannot be rendered: {_sentence(error)}") from None
        except RenderError as error:
            raise RowError(example.where, f"{self.template_name} {error.reason}", error.hint) from None

    def _answer(self, example: Chat | Completion) -> Encoded:
        """Encode one side of a pair, or a labelled answer.

        Raises:
            RowError: as for a single example, or it needs several sequences.
        """
        encoded = self(example)
        if len(encoded) > 1:
            raise RowError(
                example.where,
                f"an answer has several turns that {self.template_name} renders differently in one text",
                "give the turns before the last one as `prompt`, or data.on_error: skip leaves such rows out",
            )
        return encoded[0]

    def _chat(self, chat: Chat) -> list[Encoded]:
        if not self.assistant_only_loss:
            return [self._whole(chat)]
        if not chat.learned:
            ids = self.renderer.ids(self.renderer.render(chat.messages, chat.tools))
            return [Encoded(ids, [IGNORED] * len(ids))]
        # From the last turn backwards: a turn joins the sequence of a later one whose text begins with it.
        sequences: list[list[Piece]] = []
        for index in reversed(chat.learned):
            piece = self._piece(chat, index)
            home = next((pieces for pieces in sequences if pieces[0].text.startswith(piece.text)), None)
            if home is None:
                sequences.append([piece])
            else:
                home.append(piece)
        return [encoded for pieces in reversed(sequences) for encoded in self._tokens_of(pieces)]

    def _piece(self, chat: Chat, index: int) -> Piece:
        turn = self.renderer.turn(chat.messages, index, chat.tools)
        marks = self._marks(chat.messages[: index + 1], chat.tools)
        if marks is not None:  # spans in the turn's own rendering, in which earlier turns may differ from the prompt's
            shift = len(turn.text) - len(self.renderer.render(chat.messages[: index + 1], chat.tools))
            marks = [(start + shift, end + shift) for start, end in marks]
        return Piece(turn.text, len(turn.asked) + turn.opening, marks, turn.given)

    def _marks(self, messages: list[Message], tools: list[Tool] | None = None) -> list[Span] | None:
        """Return the spans that the template marks with {% generation %} in a conversation; None if it has no marks."""
        if not has_generation_markers(self.renderer.template(tools)):
            return None
        rendered = self.tokenizer.apply_chat_template(
            [self.renderer.adapted(message) for message in messages],
            tools=cast("list[Any] | None", tools),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        output = cast(BatchEncoding, rendered)  # as `return_dict` asks
        spans: list[Span] = []
        for (start, end), marked in zip(output["offset_mapping"], output["assistant_masks"], strict=True):
            if marked and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif marked:
                spans.append((start, end))
        return spans

    def _whole(self, chat: Chat) -> Encoded:
        """Encode a chat as one text, trained everywhere except its context and the turns that the row excludes."""
        text = self.renderer.render(chat.messages, chat.tools)
        start = 0
        if chat.context:
            start = common_length(self.renderer.prompt(chat.messages[: chat.context], chat.tools), text)
        openings = self._openings(chat, text) if self.renderer.thinks else []
        left_out = [*openings, *(self._turn_span(chat, text, index) for index in chat.unlearned)]
        for index in chat.learned:
            if lost := lost_part(self.renderer, chat.messages, index, chat.tools, RenderedTurn(text, text)):
                raise RenderError(
                    f"does not render {lost[0]} when the chat is one text, so it would be lost",
                    f"{WHOLE_HINT}; or {lost[1]}",
                )
        output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places = list(output["input_ids"]), output["offset_mapping"]
        learned = [
            inside(place, (start, len(text))) and not any(inside(place, span) for span in left_out) for place in places
        ]
        return Encoded(ids, labels_of(ids, learned), len(openings))

    def _openings(self, chat: Chat, text: str) -> list[Span]:
        """Return where the trained turns open with an empty thought that is given, not trained."""
        spans: list[Span] = []
        for index in chat.learned:
            try:
                turn = self.renderer.turn(chat.messages, index, chat.tools)
            except RenderError:
                if self.renderer.without_thought == "raise":
                    raise
                continue
            if turn.opening and text.startswith(turn.text):
                spans.append((len(turn.asked), len(turn.asked) + turn.opening))
        return spans

    def _turn_span(self, chat: Chat, text: str, index: int) -> Span:
        """Return where a turn is that the row excludes from training.

        Raises:
            RenderError: the complete text renders it differently.
        """
        turn = self.renderer.turn(chat.messages, index, chat.tools)
        if not text.startswith(turn.text):
            raise RenderError(f"rewrites turn {index + 1}, so it cannot be left out of the loss", WHOLE_HINT)
        return len(turn.asked), len(turn.text)

    def _document(self, text: str, start: int) -> Encoded:
        """Encode plain text, trained from `start` on; what the tokenizer puts before texts is added once."""
        [encoded] = self._tokens_of([Piece(text, start, None, False)])
        first = added_at_the_start(self.tokenizer, encoded.input_ids)
        labels = first if start == 0 else [IGNORED] * len(first)
        return Encoded(first + encoded.input_ids, labels + encoded.labels)

    def _ended(self, text: str) -> str:
        """Return plain text with the end token, once."""
        end = self.tokenizer.eos_token
        if not isinstance(end, str):
            raise UserError(
                "this tokenizer has no end token, so a model could not learn where a text ends",
                "use a model whose tokenizer has an eos_token",
            )
        return text if text.endswith(end) else text + end

    def _end(self) -> int:
        """Return the last trained token that is not white space; generation must be able to stop at it."""
        failures: list[Exception] = []
        for probe in PROBES:
            try:
                encoded = self._chat(Chat("a question and an answer", probe))[-1]
            except (RenderError, *TEMPLATE_ERRORS) as error:
                failures.append(error)
                continue
            learned = [
                label for label in encoded.labels if label != IGNORED and decoded(self.tokenizer, [label]).strip()
            ]
            if learned and learned[-1] in self.renderer.added:
                return learned[-1]
            raise RenderError(
                "ends the assistant's turn with no token of its own, so it would not be learned", END_HINT
            )
        raise failures[0]


WHOLE_HINT = "set training.assistant_only_loss: true, which trains each turn as rendered when it is the last one"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
