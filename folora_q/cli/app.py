"""The command group: import commands lazily, and turn errors into one line, a hint and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import rich_click as click
from click.exceptions import NoSuchOption

from folora_q import __version__
from folora_q.cli.console import concealing, print_error, set_output
from folora_q.distributed.launch import rank
from folora_q.errors import FoloraError, OtherProcessError, RunError, Terminated, UserError, first_line
from folora_q.storage.files import NoCacheError, cache_folder

# Another process waits this long before it ends with an error that the first process shows too.
SECONDS_TO_SPEAK = 3

# Command names and their modules in this folder. The command is the module's attribute `command`.
COMMANDS = {
    "train": "train",
    "init": "init",
    "recipes": "recipes",
    "explain": "explain",
    "validate": "validate",
    "preview": "preview",
    "estimate": "estimate",
    "eval": "eval",
    "report": "report",
    "compare": "compare",
    "inspect": "inspect_gate",
    "trim": "trim",
    "merge": "merge",
    "chat": "chat",
    "schema": "schema",
    "doctor": "doctor",
}
# Accepted by all commands, anywhere on the command line.
GLOBAL_OPTIONS = ("--debug", "--quiet", "--plain")
UNEXPECTED = "give --debug to see where it happened"
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT and 128 + SIGTERM, as in shells


class LazyGroup(click.RichGroup):
    """A group that lists its commands without importing them, so that `--help` does not import PyTorch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return importlib.import_module(f"folora_q.cli.{COMMANDS[name]}").command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="folora-q")
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
@click.option("--quiet", is_flag=True, help="Show errors, warnings and the final result only.")
@click.option("--plain", is_flag=True, help="Print plain lines without colours or bars, as without a terminal.")
@click.pass_context
def group(ctx: click.Context, debug: bool, quiet: bool, plain: bool) -> None:
    """Fine-tune a language model in 4 bits on one GPU or a CPU, and measure what it learned and what it forgot.

    Start with `folora-q init` for your own data, or with `folora-q train demo`. --debug, --quiet and --plain can also
    be given after a command.
    """
    ctx.obj = {"debug": debug, "quiet": quiet, "plain": plain}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 user's mistake, 130 or 143 interrupted.

    Args:
        arguments: None uses this process's, and redacts secrets until it ends, also in tracebacks.
    """
    with concealing(stay=arguments is None):
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> None:
    # These are the group's options, but users put them last.
    given = [option for option in GLOBAL_OPTIONS if option in arguments]
    arguments = given + [argument for argument in arguments if argument not in GLOBAL_OPTIONS]
    debug = "--debug" in given
    set_output(quiet="--quiet" in given, plain="--plain" in given)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a missing or replaced stream
            # A locale may lack characters, and a file's name may hold bytes, that cannot be written.
            cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    with _recording_interrupts() as received:
        try:
            code = group.main(arguments, prog_name="folora-q", standalone_mode=False)
        except (click.Abort, KeyboardInterrupt) as stop:
            interrupt = stop.__context__ or stop  # click wraps it
            if rank() == 0:
                print_error("interrupted", str(interrupt) or None)
            sys.exit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED)
        except Exception as error:
            if debug and not isinstance(error, click.ClickException):
                raise
            if received:
                print_error("interrupted", first_line(error))
                sys.exit(INTERRUPTED)
            _exit(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _recording_interrupts() -> Iterator[list[int]]:
    """Yield a list that grows at each Ctrl-C: PyTorch's C++ code can replace its KeyboardInterrupt by a ValueError."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()  # signals can be set there only
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield received
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(error: Exception, arguments: list[str]) -> NoReturn:
    """Print an error in the user's terms and exit with its code."""
    if rank():
        _exit_as_one_of_several(error)
    if isinstance(error, NoSuchOption) and (setting := _setting(error, arguments)) is not None:
        message = f"there is no option {error.option_name}; settings of the recipe are written as key=value"
        print_error(message, setting)
        sys.exit(UserError.exit_code)
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if isinstance(error, FoloraError):
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
    print_error(*_in_words(error))
    sys.exit(RunError.exit_code)


def _exit_as_one_of_several(error: Exception) -> NoReturn:
    """Exit as another process than the first, and print only what no other process prints."""
    if isinstance(error, UserError | click.ClickException):
        time.sleep(SECONDS_TO_SPEAK)  # the launcher ends the first process as soon as this one has ended
        sys.exit(error.exit_code)
    if not isinstance(error, OtherProcessError):
        message, hint = (error.message, error.hint) if isinstance(error, FoloraError) else _in_words(error)
        print_error(f"process {rank()}: {message}", hint)
    sys.exit(RunError.exit_code)


def _setting(error: NoSuchOption, arguments: list[str]) -> str | None:
    """Return the setting that an unknown option of a command with a recipe stands for, as it is to be written."""
    if error.ctx is None or not any(parameter.name == "overrides" for parameter in error.ctx.command.params):
        return None
    from folora_q.recipe.findings import setting_for

    key = setting_for(error.option_name)
    if key is None:
        return None
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == error.option_name:
            follows = arguments[number + 1] if number + 1 < len(arguments) else "VALUE"
            return f"write {key}={value if equals else follows}"
    return f"write {key}=VALUE"


def _in_words(error: Exception) -> tuple[str, str]:
    """Return message and hint for an unexpected error."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        cache = isinstance(error, NoCacheError) or _is_of_the_cache(error.filename)
        hint = "set FOLORA_Q_CACHE to a folder that can be written" if cache else UNEXPECTED
        return f"{where}{error.strerror}", hint
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        unnamed = error.object[error.start : error.end]
        return (
            f"no file can be named {unnamed!r} in this locale, whose encoding is {sys.getfilesystemencoding()}",
            "set LC_ALL=C.UTF-8, or PYTHONUTF8=1",
        )
    return f"{type(error).__name__}: {error}", UNEXPECTED


def _is_of_the_cache(name: Any) -> bool:
    """Whether a path is in the cache folder, or one of its parents."""
    try:
        path, cache = Path(os.fsdecode(name)), cache_folder()
    except (TypeError, OSError):
        return False
    return path.is_relative_to(cache) or cache.is_relative_to(path)
