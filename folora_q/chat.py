"""Talk to the result of a run: an adapter on its 4-bit base, or a model. Text comes as it is written; nothing prints.

Prompts are made as the evaluation makes them, so a greedy answer is the one that stands in answers.jsonl.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.formats import Chat, Completion, Message, shape_of, to_example
from folora_q.data.rows import Row
from folora_q.data.sources import read_source
from folora_q.data.tokens import prompt_ids
from folora_q.errors import RunFailed, UserError
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import load_model
from folora_q.models.tokenizer import load_tokenizer, loading, local_or_hub
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.paths import is_hub_dataset, short
from folora_q.recipe.schema import ModelSection
from folora_q.recipe.strict_yaml import parse_yaml
from folora_q.runs.folder import RunFolder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE_REPORT = "merge.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FIRST_ROWS = 20
WHAT_TO_NAME = "name a run folder, an adapter's folder, a model's folder, a .gguf file or a hub id"
# Below this, sampling is greedy: the most likely token has all of the probability, if the division can be made at all.
LEAST_TEMPERATURE = 1e-3
# What bytes that are no whole character yet are decoded to.
INCOMPLETE = "\ufffd"
# What a template may raise on a conversation that it does not take.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)
# What PEFT and safetensors raise for an adapter that cannot be read, or belongs to another model.
ADAPTER_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: temperature 0 is greedy; what is not said here is as the model's authors set it."""

    temperature: float = 0.7
    max_new_tokens: int = 512


@dataclass
class Chatter:
    """A model that answers, with its adapter and without.

    Attributes:
        name: as it was asked for.
        origin: what was loaded, for people.
        stops: the tokens that end an answer.
        base: the model to compare with, where the model is no adapter on one.
        system: the system prompt that it was trained with, where that is known and always the same.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: Tokenizer
    name: str
    origin: str
    stops: list[int]
    base: PreTrainedModel | None = None
    system: str | None = None
    _turn: Lock = field(default_factory=Lock, repr=False)

    @property
    def has_template(self) -> bool:
        """Whether it takes conversations; without a chat template it continues plain text."""
        return self.tokenizer.chat_template is not None

    @property
    def can_compare(self) -> bool:
        """Whether there is a base that can answer too."""
        return self.base is not None or isinstance(self.model, PeftModel)

    def reply(self, messages: Sequence[Message], base: bool, settings: Sampling) -> Iterator[str]:
        """Answer, piece by piece as it is written. Closing the iterator ends the writing.

        Args:
            messages: the conversation, the user's turn last; without a chat template that turn alone is continued.
            base: answer as the base does.

        Raises:
            UserError: there is no base, the chat template does not take the conversation, or it is longer than the
                model's context.
            RunFailed: the device's memory does not hold it.
        """
        if base and not self.can_compare:
            raise _nothing_to_compare(self.name)
        ids = self._prompt(messages)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - len(ids))
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the context of {self.name} is {context:,}",
                "begin a new one: /reset forgets what was said",
            )
        sampled = settings.temperature >= LEAST_TEMPERATURE
        how: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": room}
        # Greedy with settings of sampling left over from the model's configuration would only be warned of.
        how |= {"temperature": settings.temperature} if sampled else dict.fromkeys(("temperature", "top_p", "top_k"))
        return self._stream(ids, base, how)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        said = messages[-1]["content"]
        if not self.has_template:
            ids = prompt_ids(self.tokenizer, Completion("chat", said, ""))
        else:
            answer = {"role": "assistant", "content": ""}  # the place of what is asked for
            try:
                ids = prompt_ids(self.tokenizer, Chat("chat", [*messages, answer]))
            except TEMPLATE_ERRORS as error:
                roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
                raise UserError(
                    f"the chat template of {self.name} does not take this conversation ({roles}): {_first_line(error)}",
                    "many templates take no system turn: leave out --system" if "system" in roles else None,
                ) from error
        if not ids:
            raise UserError("there is nothing to continue: the text has no tokens")
        return ids

    def _stream(self, ids: list[int], base: bool, how: dict[str, Any]) -> Iterator[str]:
        stop, failures = Event(), []
        streamer = _Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model = self.base if base and self.base is not None else self.model
        inputs = torch.tensor([ids], device=model.device)
        pad = self.tokenizer.pad_token_id

        def write() -> None:
            try:
                bare = model.disable_adapter() if base and isinstance(model, PeftModel) else nullcontext()
                # One at a time: an answer that was given up may still be at its last token, without its adapter.
                with self._turn, bare:
                    model.generate(
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
                raise RunFailed(
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

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces. What was said until then is remembered if it is cut short, too."""
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        try:
            with closing(self.chatter.reply(asked, self.base, self.settings)) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:
            if answer.strip():
                self.messages = [*asked, {"role": "assistant", "content": answer}]


def load_chat(name: str, dtype: str = "auto", bits: int = 4, compare: bool = False) -> Chatter:
    """Load what a name stands for.

    Args:
        name: a run folder, an adapter's folder, or a model: a folder, a .gguf file or a hub id.
        dtype: compute dtype; auto is the recipe's where there is one, else the hardware's.
        bits: of the model's weights, 4 as in training or 16.
        compare: there must be a base to compare with. A merged model's, named in its merge.json, is loaded besides it.

    Raises:
        UserError: there is no such thing, it cannot be loaded, or there is nothing to compare it with.
    """
    found = _find(name)
    if compare and found.adapter is None and found.base is None:
        raise _nothing_to_compare(name)
    hardware = choose_hardware(found.section.dtype if dtype == "auto" else dtype)
    try:
        tokenizer = _tokenizer(found)
        model = _load(found.section, hardware, tokenizer, bits)
    except UserError as error:
        raise _explained(found, error) from error
    if found.adapter is not None and (found.adapter / "generation_config.json").is_file():
        with loading(found.section):
            model.generation_config = GenerationConfig.from_pretrained(found.adapter)
    stops = model.generation_config.eos_token_id
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    base = None
    if compare and found.adapter is None and found.base is not None:
        try:
            base = _load(found.base, hardware, tokenizer, bits)
        except UserError as error:
            reason = f"{Path(name) / MERGE_REPORT} names a base: {error.message}"
            raise UserError(reason, "leave out --base") from error
        base.generation_config = model.generation_config  # they stop alike
    chosen = f"{bits} bits, computing in {str(hardware.dtype).removeprefix('torch.')} on {hardware.reason}"
    return Chatter(
        model=model if found.adapter is None else _with_adapter(model, found.adapter),
        tokenizer=tokenizer,
        name=name,
        origin=f"{found.kind}, in {chosen}",
        stops=stops,
        base=base,
        system=found.system,
    )


@dataclass(frozen=True)
class _Found:
    """What a name stands for.

    Attributes:
        kind: for people.
        section: the model to load.
        adapter: the folder of the adapter on it.
        base: what a merged model says that it was made of.
        system: the system prompt that a run was trained with.
    """

    kind: str
    section: ModelSection
    adapter: Path | None = None
    base: ModelSection | None = None
    system: str | None = None


def _find(name: str) -> _Found:
    path = Path(name)
    there = os.path.exists(name)  # False too for a name that is too long, or holds a NUL
    if there and path.is_dir():
        if RunFolder(path).manifest.is_file():
            return _find_run(RunFolder(path))
        if (path / ADAPTER_CONFIG).is_file():
            return _find_adapter(path)
        if (path / "config.json").is_file():
            report = _read_json(path / MERGE_REPORT) if (path / MERGE_REPORT).is_file() else {}
            base = _section_of(report.get("base"), report.get("revision"))
            kind = f"merged model, its base {base.model_name_or_path}" if base else "model"
            return _Found(kind, ModelSection(model_name_or_path=name), base=base)
        raise UserError(
            f"{path} is no run, adapter or model: it holds no run.json, {ADAPTER_CONFIG} or config.json",
            _hint_inside(path),
        )
    if there and path.suffix != ".gguf":
        raise UserError(f"{path} is a file, but no .gguf file", WHAT_TO_NAME)
    is_hub_name = HUB_NAME.fullmatch(name) and not ("/" in name and path.parent.is_dir())
    if name != DEMO_MODEL and not there and (path.suffix == ".gguf" or not is_hub_name):
        raise UserError(f"there is no run, adapter or model at {short(name)!r}{_near(path)}", WHAT_TO_NAME)
    return _Found("model", ModelSection(model_name_or_path=name))


def _find_run(run: RunFolder) -> _Found:
    if not (run.adapter / ADAPTER_CONFIG).is_file():
        status = _read_json(run.manifest).get("status")
        saved = [folder for folder in run.path.glob("checkpoint-*") if (folder / ADAPTER_CONFIG).is_file()]
        newest = max(saved, key=lambda folder: folder.stat().st_mtime, default=None)
        raise UserError(
            f"the run in {run.path} has no adapter" + (f": it is marked as {status}" if status else ""),
            f"a checkpoint of it can be asked: folora-q chat {newest}" if newest else None,
        )
    if not run.recipe.is_file():
        return _find_adapter(run.adapter)
    try:
        recipe = parse_yaml(run.recipe.read_text(encoding="utf-8"))[0]
        section = ModelSection.model_validate(recipe["model"])
        data = DataSection.model_validate(recipe["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.recipe} cannot be read: {_first_line(error)}", f"name the adapter itself: {run.adapter}"
        ) from None
    # The attention backend was chosen for training, perhaps on another machine; all of them compute the same.
    section = section.model_copy(update={"attn_implementation": "auto"})
    return _Found(
        f"adapter of a run on {section.model_name_or_path}", section, run.adapter, system=_system_prompt(data)
    )


def _system_prompt(data: DataSection) -> str | None:
    """The one that the first training rows share, if they do and their files are still there."""
    source = data.train_dataset[0]
    if is_hub_dataset(source):
        return None
    try:
        rows = [row for row in islice(read_source(source), FIRST_ROWS) if isinstance(row, Row)]
        examples = [to_example(row, shape_of(row, source), source) for row in rows]
    except (UserError, OSError):
        return None
    chats = [example.messages[0] for example in examples if isinstance(example, Chat)]
    prompts = {first["content"] if first["role"] == "system" else None for first in chats}
    return prompts.pop() if len(prompts) == 1 else None


def _find_adapter(folder: Path) -> _Found:
    config = _read_json(folder / ADAPTER_CONFIG)
    section = _section_of(config.get("base_model_name_or_path"), config.get("revision"))
    if section is None:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names no base model", "write its name there as base_model_name_or_path"
        )
    mapping = config.get("auto_mapping")
    held = mapping.get("quantization_config") if isinstance(mapping, dict) else None
    if isinstance(held, dict):  # as folora-q writes how the base was held in training
        keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        try:
            section = ModelSection.model_validate(
                section.model_dump() | {key: held[key] for key in keys if key in held}
            )
        except ValidationError as error:
            raise UserError(f"{folder / ADAPTER_CONFIG} cannot be used: {error.errors()[0]['msg']}") from None
    return _Found(f"adapter on {section.model_name_or_path}", section, folder)


def _section_of(name: object, revision: object) -> ModelSection | None:
    """The model that a JSON file names, if it does."""
    if not isinstance(name, str) or not name:
        return None
    return ModelSection(model_name_or_path=name, revision=revision if isinstance(revision, str) else None)


def _tokenizer(found: _Found) -> Tokenizer:
    """The adapter's own where it has one, with the base's chat template if it has none."""
    folder = found.adapter
    if folder is None:
        return load_tokenizer(found.section)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(folder)) if own else found.section)
    template = folder / "chat_template.jinja"
    if not own and template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {template}: {error}") from None
    elif own and tokenizer.chat_template is None:
        tokenizer.chat_template = load_tokenizer(found.section).chat_template
    return tokenizer


def _load(section: ModelSection, hardware: Hardware, tokenizer: Tokenizer, bits: int) -> PreTrainedModel:
    if bits == 4:
        return load_model(section, hardware, tokenizer).model
    with loading(section):
        model = AutoModelForCausalLM.from_pretrained(
            local_or_hub(section.model_name_or_path),
            revision=section.revision,
            dtype=hardware.dtype,
            device_map={"": hardware.device},
        )
    return model.requires_grad_(False).eval()


def _with_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"there is no {folder / ADAPTER_WEIGHTS[0]}")
    base = model.name_or_path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuned = PeftModel.from_pretrained(model, folder).eval()
        except ADAPTER_ERRORS as error:
            raise UserError(
                f"cannot put the adapter {folder} on {base}: {_first_line(error)}",
                "is it damaged, or was it trained on another model?",
            ) from error
    # PEFT goes on without the weights that it does not find, which is an adapter that does nothing there.
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise UserError(
            f"the adapter {folder} does not fit {base}: it lacks weights for some of its layers",
            "was it trained on another model?",
        )
    return tuned


class _Stopped(StoppingCriteria):
    """Ends the writing when nobody reads any more."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class _Pieces(TextIteratorStreamer):
    """Text as soon as its characters are whole.

    The parent waits for a space, and after each line decodes anew, where many tokenizers drop the first space. Here a
    token is decoded behind those of the piece before it.
    """

    def __init__(self, tokenizer: Tokenizer, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self._tokens: list[int] = []  # those of the last piece, and what is not written yet
        self._written = 0  # so many of them are

    def put(self, value: torch.Tensor) -> None:
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self._tokens += value.reshape(-1).tolist()
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
        before = self.tokenizer.decode(self._tokens[: self._written], **self.decode_kwargs)
        return self.tokenizer.decode(self._tokens, **self.decode_kwargs)[len(before) :]


def _nothing_to_compare(name: str) -> UserError:
    return UserError(f"{name} is no adapter, so there is nothing to compare it with", "leave out --base")


def _explained(found: _Found, error: UserError) -> UserError:
    """What cannot be loaded, in the words of what was asked for."""
    if found.adapter is not None:
        return UserError(f"the adapter {found.adapter} needs its base and tokenizer: {error.message}", error.hint)
    name = found.section.model_name_or_path
    if os.path.exists(name):
        return error
    reason = error.message.removeprefix(f"cannot load the model {name}: ")
    return UserError(f"{name} is no run or adapter here, and no model that can be loaded: {reason}", WHAT_TO_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value


def _hint_inside(path: Path) -> str:
    """The first run, adapter or model in a folder that is none, which is perhaps what was meant."""
    for name in ("run.json", ADAPTER_CONFIG, "config.json"):
        if inside := sorted(path.glob(f"*/{name}")):
            return f"did you mean {inside[0].parent}?"
    return WHAT_TO_NAME


def _near(path: Path) -> str:
    try:
        near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    except (OSError, ValueError):
        near = []
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
