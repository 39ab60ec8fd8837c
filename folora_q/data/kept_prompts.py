"""Render the prompts of capabilities and of the user's files, and divide them: for the penalty, and held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from folora_q.data.call_syntax import CallSyntax, call_syntax, offers_tools
from folora_q.data.capability_prompts import Ask, packaged_tools, prompts_of
from folora_q.data.keep_files import KeepFile, read_keep_files
from folora_q.data.rendering import SWITCHES, Renderer, RenderError
from folora_q.data.thoughts import OPEN
from folora_q.data.tokens import TEMPLATE_ERRORS, text_ids
from folora_q.errors import UserError
from folora_q.recipe.capabilities import CAPABILITIES, MIN_HELD_OUT, CapabilityName
from folora_q.recipe.keep import KeepSection

Item = TypeVar("Item")
# Prompts, or windows of text, of each half of a file: with more, measuring takes long and tells little more.
MAX_OF_FILE = 64
WINDOW, MIN_WINDOW = 128, 16  # tokens


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt that the base and the tuned model answer.

    Attributes:
        ids: its tokens.
        text: as the chat template renders it; None without a template.
    """

    ask: Ask
    ids: list[int]
    text: str | None


class Halves(NamedTuple, Generic[Item]):
    """What enters the penalty, and what is held out."""

    penalty: list[Item]
    held_out: list[Item]


@dataclass(frozen=True)
class KeptSource:
    """A capability, or a file of the user's, for one model.

    Attributes:
        name: for tables.
        capability: None for a file.
        prompts: to be answered.
        texts: windows of tokens, which are kept as they are.
        calls: the syntax of the template's tool calls, if it has one.
        max_new_tokens: maximum length of an answer.
    """

    name: str
    capability: CapabilityName | None
    prompts: Halves[KeptPrompt]
    texts: Halves[list[int]]
    calls: CallSyntax | None
    max_new_tokens: int

    @property
    def to_measure(self) -> KeptSource:
        """The source without what enters a penalty."""
        return replace(self, prompts=Halves([], self.prompts.held_out), texts=Halves([], self.texts.held_out))


def kept_sources(
    section: KeepSection, renderer: Renderer, note: Callable[[str], None], most: int | None = None
) -> list[KeptSource]:
    """Prepare what a recipe keeps; a capability that the chat template cannot express is left out, with a note.

    Args:
        most: the longest prompt with its answer that the model can read, in tokens; None: any.

    Raises:
        UserError: a file cannot be used, or is too short.
    """
    found: list[KeptSource] = []
    for name in section.capabilities:
        length = section.answer_length(name)
        reason, prompts = _missing(name, renderer), []
        if reason is None:
            think = CAPABILITIES[name].requires == "thoughts"  # others leave no room for a thought
            prompts = _rendered(prompts_of(name), renderer, think, None if most is None else most - length)
            if len(prompts) < 2 * MIN_HELD_OUT:
                reason = f"only {len(prompts)} of its prompts can be rendered, or are short enough for the model"
        if reason is not None:
            note(f"keep: {name} is left out: {reason}")
            continue
        calls = call_syntax(renderer) if name == "tools" else None
        found.append(KeptSource(name, name, _alternating(prompts), Halves([], []), calls, length))
    files = read_keep_files(section.files)
    return found + [_of_file(file, renderer, section.answer_length(None), most) for file in files]


def _missing(name: CapabilityName, renderer: Renderer) -> str | None:
    """Return why a model has no such capability, as far as its chat template says; None if it may have it."""
    requires = CAPABILITIES[name].requires
    if not renderer.has_template:
        return "the model has no chat template"
    if requires == "thoughts" and not _thinks(renderer):
        return "the chat template has no thoughts"
    if requires == "tools":
        if not offers_tools(renderer, [next(iter(packaged_tools().values()))]):
            return "the chat template has no tools"
        if call_syntax(renderer) is None:
            return "the chat template writes no tool calls"
    return None


def _thinks(renderer: Renderer) -> bool:
    """Return whether a template renders thoughts, switches them, or opens one in its prompt."""
    if renderer.thinks or any(name in renderer.template() for name in SWITCHES):
        return True
    try:
        return renderer.render([{"role": "user", "content": "a"}], prompt=True).rstrip().endswith(OPEN)
    except TEMPLATE_ERRORS:
        return False


def _rendered(asks: Sequence[Ask], renderer: Renderer, think: bool | None, most: int | None) -> list[KeptPrompt]:
    """Render prompts; those on which the template fails, or that are too long, are left out.

    Args:
        think: ask for a thought, or for none, where the template knows thoughts; None: as the template does by default.
    """
    found = []
    for ask in asks:
        if not renderer.has_template:
            text, ids = None, text_ids(renderer.tokenizer, str(ask.messages[-1]["content"]))
        else:
            try:
                text = _prompt(ask, renderer, think)
            except (RenderError, *TEMPLATE_ERRORS):
                continue
            ids = renderer.ids(text)
        if most is None or len(ids) <= most:
            found.append(KeptPrompt(ask, ids, text))
    return found


def _prompt(ask: Ask, renderer: Renderer, think: bool | None) -> str:
    if think is False and not ask.tools:  # a call may need another opening than an answer, as gpt-oss's
        try:
            return renderer.prompt(ask.messages, ask.tools, think=False)
        except (RenderError, *TEMPLATE_ERRORS):
            pass
    known = SWITCHES if think is not None else ()
    switches = {name: bool(think) for name in known if name in renderer.template(ask.tools)}
    return renderer.render(ask.messages, ask.tools, prompt=True, **switches)


def _of_file(file: KeepFile, renderer: Renderer, length: int, most: int | None) -> KeptSource:
    # The default of the template: its thoughts, if it has any, are part of what is kept.
    prompts = _alternating(_rendered(file.prompts, renderer, None, None if most is None else most - length))
    texts = _windows(file.texts, renderer)
    halves = prompts if file.prompts else texts
    few = min(len(halves.penalty), len(halves.held_out))
    if few < MIN_HELD_OUT:
        what = "prompts that the chat template renders" if file.prompts else f"windows of {WINDOW} tokens"
        raise UserError(
            f"keep.files: a half of {file.name} gives {few} {what}, and {MIN_HELD_OUT} are needed in each half",
            "add to the file, or order it otherwise: every second row is held out",
        )
    return KeptSource(file.name, None, _limited(prompts), _limited(texts), None, length)


def _windows(texts: Sequence[str], renderer: Renderer) -> Halves[list[int]]:
    """Cut texts into windows. Every second text is held out, of a single text the second half."""
    rows = [renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    if len(rows) == 1:
        middle = len(rows[0]) // 2
        rows = [rows[0][:middle], rows[0][middle:]]

    def cut(part: Sequence[list[int]]) -> list[list[int]]:
        windows = [ids[start : start + WINDOW] for ids in part for start in range(0, len(ids), WINDOW)]
        return [window for window in windows if len(window) >= MIN_WINDOW]

    return Halves(cut(rows[::2]), cut(rows[1::2]))


def _alternating(items: Sequence[Item]) -> Halves[Item]:
    return Halves(list(items[::2]), list(items[1::2]))


def _limited(halves: Halves[Item]) -> Halves[Item]:
    """Return at most MAX_OF_FILE of each half, evenly spaced."""

    def spaced(items: list[Item]) -> list[Item]:
        count = min(len(items), MAX_OF_FILE)
        return [items[number * len(items) // count] for number in range(count)]

    return Halves(spaced(halves.penalty), spaced(halves.held_out))
