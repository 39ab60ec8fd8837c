"""`folora-q chat`: chat with the result of a run, and with its base."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import rich_click as click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from folora_q.cli.console import err, out, print_error, starting, visible
from folora_q.cli.options import trust_options
from folora_q.errors import FoloraError, UserError
from folora_q.models.trust import Trust
from folora_q.targets.find import find_target, require_reachable

if TYPE_CHECKING:
    from folora_q.chat.reply import Conversation

BASE, TUNED = "base", "tuned"
PROMPT = "> "
# Minimum width to show two answers side by side.
SIDE_BY_SIDE = 100
GAP = 3
REFRESHES_PER_SECOND = 8
FORGET, END = "/reset", "/exit"
COMMAND_WORD = re.compile(r"/\w+")


@click.command("chat")
@click.argument(
    "name", metavar="RUN_OR_MODEL", help="A run folder, an adapter or model folder, a .gguf file, or a hub id."
)
@click.option("--base", "compare", is_flag=True, help="Also show the answers of the base model.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option(
    "--temperature",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0, 100),
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option(
    "--max-new-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Maximum length of an answer in tokens.",
)
@click.option(
    "--bits",
    default="4",
    show_default=True,
    type=click.Choice(["4", "16"]),
    help="Weight precision in bits; training uses 4.",
)
@click.option(
    "--think/--no-think",
    default=None,
    help="Whether the model thinks before it answers. Default: as it was trained.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Send this prompt and exit; can be repeated.")
@trust_options
@click.pass_obj
def command(
    settings: dict[str, bool],
    name: str,
    compare: bool,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    bits: str,
    think: bool | None,
    prompts: tuple[str, ...],
    trust: Trust,
) -> None:
    """Chat with the result of a run, or with any model, through its chat template.

    /reset starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer. Without a terminal, every line of
    the input is a prompt. All prompts, those of --prompt too, belong to one conversation.
    """
    if math.isnan(temperature):
        raise UserError("--temperature must be a number")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty")
    require_reachable(find_target(name))  # what needs a few JSON files only is found before PyTorch is imported
    with starting(settings["debug"]) as progress:
        from folora_q.chat.load import load_chat
        from folora_q.chat.reply import Conversation, Sampling
    with progress.stage("loading the model", None):
        chatter = load_chat(name, "auto", int(bits), compare, trust)
    progress.note(chatter.origin)
    if think is None and chatter.thoughtless:
        progress.note("it was trained on answers without thoughts, so its thought is left empty; --think lets it think")
    sampling = Sampling(temperature, max_new_tokens, not chatter.thoughtless if think is None else think)
    sides = {TUNED: Conversation(chatter, False, sampling, system and _clean(system))}
    if compare:
        sides = {BASE: Conversation(chatter, True, sampling, system and _clean(system))} | sides
    if not chatter.has_template:
        progress.note("it has no chat template: it continues each question as plain text")
    elif chatter.system is not None and system is None:
        progress.note(f"it was trained with a system prompt; set it with --system {shlex.quote(chatter.system)}")

    if prompts:
        _ask_all(iter(prompts), sides)
    elif sys.stdin.isatty() and out.is_terminal:
        _talk(sides)
    else:
        if sys.stdin.isatty():
            progress.note("one question per line, Ctrl-D ends")
        # click 8.5 provides this lazily, without a type.
        lines = click.get_text_stream("stdin", encoding="utf-8", errors="replace")  # pyright: ignore[reportCallIssue]
        _ask_all(lines, sides)


def _talk(sides: dict[str, Conversation]) -> None:
    """Run the loop in a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for `input`)
    err.print(
        f"[dim]{FORGET} starts a new conversation, {END} or Ctrl-D quits, Ctrl-C stops an answer[/]", soft_wrap=True
    )
    while (question := _next_question()) != END:
        if question == FORGET:
            _forget(sides)
            err.print("[dim]new conversation[/]")
        elif COMMAND_WORD.fullmatch(question):
            print_error(f"there is no command {question}", f"{FORGET} starts a new conversation, {END} quits")
        elif question:
            try:
                _ask(question, sides, can_be_stopped=True)
            except FoloraError as error:
                print_error(error.message, error.hint)
            except KeyboardInterrupt:  # between two answers
                click.echo()
            click.echo()


def _next_question() -> str:
    """Read a line from the terminal; END at the end of the input, or at Ctrl-C on an empty line."""
    try:
        return _clean(input(PROMPT)).strip()
    except EOFError:
        click.echo()
        return END
    except KeyboardInterrupt:
        click.echo()
        return "" if _typed() else END
    except UnicodeDecodeError:
        print_error("this line is not valid UTF-8")
        return ""


def _ask_all(questions: Iterator[str], sides: dict[str, Conversation]) -> None:
    """Ask questions from the command line or a file; only answers go to stdout."""
    asked = 0
    for line in questions:
        question = _clean(line).strip()
        if question == END:
            return
        if question == FORGET:
            _forget(sides)
        elif question:
            if asked and (out.is_terminal or len(sides) > 1):
                click.echo()
            if out.is_terminal:
                out.print(Text(PROMPT + visible(question), style="dim"), soft_wrap=True)
            _ask(question, sides, can_be_stopped=False)
            asked += 1


def _ask(question: str, sides: dict[str, Conversation], can_be_stopped: bool) -> None:
    side_by_side = len(sides) > 1 and out.is_terminal and not out.is_dumb_terminal and out.width >= SIDE_BY_SIDE
    (_answer_side_by_side if side_by_side else _answer_below)(question, sides, can_be_stopped)


def _answer_below(question: str, sides: dict[str, Conversation], can_be_stopped: bool) -> None:
    """Print one answer after the other, as they are generated."""
    for number, (label, side) in enumerate(sides.items()):
        if len(sides) > 1:
            click.echo(("\n" if number else "") + click.style(label, **{"dim" if label == BASE else "bold": True}))
        shown = ""
        try:
            with _stopping(can_be_stopped), closing(side.ask(question)) as pieces:
                for piece in pieces:
                    shown = visible(piece)
                    # Not through rich, which would replace tabs by spaces.
                    click.echo(click.style(shown, dim=True) if label == BASE else shown, nl=False)
        except BaseException:
            if shown and not shown.endswith("\n"):
                click.echo()
            raise
        if not shown.endswith("\n"):
            click.echo()


def _answer_side_by_side(question: str, sides: dict[str, Conversation], can_be_stopped: bool) -> None:
    """Print both answers in columns, generated one after the other."""
    columns = _Columns(dict.fromkeys(sides, ""))
    with Live(columns, console=out, refresh_per_second=REFRESHES_PER_SECOND):
        try:
            for label, side in sides.items():
                with _stopping(can_be_stopped), closing(side.ask(question)) as pieces:
                    for piece in pieces:
                        columns.said[label] += visible(piece)
        finally:
            columns.whole = True


@dataclass
class _Columns:
    """Answers side by side; while they are generated, as much of their ends as fits on the screen."""

    said: dict[str, str]
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = (options.max_width - GAP * (len(self.said) - 1)) // len(self.said)
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
        cells = []
        for label, said in self.said.items():
            style = "dim" if label == BASE else ""
            table.add_column(label, width=width, header_style=style or "bold")
            lines = Text(said, style=style).wrap(console, width, tab_size=console.tab_size)
            # The header and the cursor's line need space too.
            cells.append(Text("\n").join(lines if self.whole else lines[-max(console.height - 2, 1) :]))
        table.add_row(*cells)
        yield table


@contextlib.contextmanager
def _stopping(allowed: bool) -> Iterator[None]:
    """Let Ctrl-C stop the answer instead of the program, if allowed."""
    try:
        yield
    except KeyboardInterrupt:
        if not allowed:
            raise


def _forget(sides: dict[str, Conversation]) -> None:
    for side in sides.values():
        side.reset()


def _typed() -> str:
    """Return the line as it was when Ctrl-C was pressed; empty if unknown."""
    return sys.modules["readline"].get_line_buffer() if "readline" in sys.modules else ""


def _clean(text: str) -> str:
    """Replace lone surrogates, which stand for bytes that are not UTF-8 and which tokenizers reject."""
    return text.encode("utf-8", "replace").decode("utf-8")
