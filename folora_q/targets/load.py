"""Load a target: its tokenizer, the model with its adapter, and the base to compare it with."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from folora_q.errors import UserError, first_line
from folora_q.memory.config import files_here
from folora_q.models.demo import DEMO_MODEL
from folora_q.models.hardware import Hardware, choose_hardware
from folora_q.models.load import load_model, load_unquantized
from folora_q.models.quantization import Quantization
from folora_q.models.tokenizer import IF_THERE, load_tokenizer, loading
from folora_q.models.trust import ADAPTER_CONFIG, NOTHING, PICKLED_ADAPTER, SAFE_ADAPTER, Trust, check_adapter
from folora_q.recipe.paths import HUB_MODEL, short
from folora_q.recipe.schema import ModelSection
from folora_q.runs.folder import MERGE_REPORT
from folora_q.targets.embeddings import fit_embedding
from folora_q.targets.find import Target, explained, find_target

ADAPTER_WEIGHTS = (SAFE_ADAPTER, PICKLED_ADAPTER)
# Files that are fetched of a hub adapter, besides its configuration.
ADAPTER_FILES = (
    SAFE_ADAPTER,
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
# What PEFT and safetensors raise for an adapter that cannot be read, or belongs to another model.
ADAPTER_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, EOFError),
    *(SafetensorError, UnpicklingError),
)


@dataclass(frozen=True)
class Precision:
    """Precision in which a model is loaded.

    Attributes:
        dtype: compute dtype; auto is the recipe's for a run, else the hardware's.
        bits: weight precision, 4 as in training or 16.
    """

    dtype: str = "auto"
    bits: int = 4


@dataclass(frozen=True)
class LoadedTarget:
    """A frozen model, and the base to compare it with.

    Attributes:
        model: with its adapter, if any; switching the adapter off gives the base.
        base: a second model, if a comparison was asked for and there is no adapter to switch off.
        bits: 4 or 16.
        held: weight precision and compute dtype, for display.
        fingerprint: of the base (or of the only model) as loaded; the key of the cache of sampled text.
    """

    target: Target
    tokenizer: Tokenizer
    model: PreTrainedModel | PeftModel
    base: PreTrainedModel | None
    hardware: Hardware
    bits: int
    held: str
    fingerprint: str


def load_target(
    target: Target,
    precision: Precision = Precision(),
    against: ModelSection | None = None,
    compare: bool = False,
    trust: Trust = NOTHING,
) -> LoadedTarget:
    """Load a target.

    Args:
        against: a base to use instead of the one that an adapter or a merged model names. Only its name and revision
            are used; its precision is the model's.
        compare: require a base to compare with; the base of a merged model is loaded as a second model.

    Raises:
        UserError: it cannot be loaded, `trust` does not allow what it needs, or there is no base to compare with.
        RunError: no layer could be quantized to 4 bits, or the demo's model could not be fetched.
    """
    target = fetched(target)
    adapter, section, base_section = target.adapter, target.section, against or target.base
    if compare and adapter is None and base_section is None:
        raise nothing_to_compare(target.name)
    if adapter is not None:
        check_adapter(adapter, trust)
    if compare and adapter is not None and _learns_a_prompt(adapter):
        raise UserError(
            f"the adapter {adapter} is a learned prompt, which cannot be switched off layer by layer to compare it with"
            " its base",
            "chat with it by `folora-q chat` without --base",
        )
    if against is not None and adapter is not None:
        section = _instead(section, against)
    hardware = choose_hardware(section.dtype if precision.dtype == "auto" else precision.dtype)
    try:
        tokenizer = _tokenizer(adapter, section, trust)
        model, fingerprint, four_bit = _load(section, hardware, tokenizer, precision.bits, trust)
    except UserError as error:
        raise explained(target, error) from error
    if adapter is not None and (adapter / "generation_config.json").is_file():
        with loading(section):
            model.generation_config = GenerationConfig.from_pretrained(adapter)
    base = None
    if compare and adapter is None and base_section is not None:
        try:
            base_section = _instead(section, base_section)
            base, fingerprint, _ = _load(base_section, hardware, tokenizer, precision.bits, trust)
        except UserError as error:
            if against is not None:
                raise
            reason = f"{Path(target.name) / MERGE_REPORT} names a base: {error.message}"
            raise UserError(reason, "leave out --base") from error
        base.generation_config = model.generation_config  # so that both stop at the same tokens
    return LoadedTarget(
        target=target,
        tokenizer=tokenizer,
        model=model if adapter is None else _with_adapter(model, adapter, section, compare),
        base=base,
        hardware=hardware,
        bits=precision.bits,
        held=f"{precision.bits} bits{f' ({four_bit})' if four_bit else ''}, computing in {hardware}",
        fingerprint=fingerprint,
    )


def fetched(target: Target) -> Target:
    """Download a hub adapter, and return the target with its cache folder; return other targets unchanged.

    Raises:
        UserError: the adapter names a folder of this machine as its base, which a download may not do.
    """
    name, revision = target.section.model_name_or_path, target.section.revision
    if target.adapter is not None or name == DEMO_MODEL or os.path.exists(name):
        return target
    with suppress(OSError, ValueError):  # not an adapter, or not found, which loading it as a model reports
        if (config := cached_file(name, ADAPTER_CONFIG, revision=revision, **IF_THERE)) is None:
            return target
        folder = Path(config).parent
        for file in ADAPTER_FILES:
            cached_file(name, file, revision=folder.name, **IF_THERE)
        if not (folder / SAFE_ADAPTER).is_file():
            cached_file(name, PICKLED_ADAPTER, revision=folder.name, **IF_THERE)
        found = find_target(str(folder))
        base = found.section.model_name_or_path
        if os.path.exists(base) or not HUB_MODEL.fullmatch(base):
            raise UserError(
                f"the adapter {name} names a file of this machine as its base: {short(base)}",
                f"download it (`hf download {name} --local-dir FOLDER`), write the base's hub id into its "
                f"{ADAPTER_CONFIG}, and name that folder",
            )
        return replace(found, name=target.name)
    return target


def nothing_to_compare(name: str) -> UserError:
    """Return the error for a target with neither an adapter to switch off nor a base."""
    return UserError(
        f"{name} is not an adapter, so there is nothing to compare it with",
        "with `folora-q chat`, leave out --base; with `folora-q eval`, name its base with --against",
    )


def _instead(section: ModelSection, other: ModelSection) -> ModelSection:
    """Return a section for another model with the precision and settings of this one."""
    return section.model_copy(update={"model_name_or_path": other.model_name_or_path, "revision": other.revision})


def _learns_a_prompt(adapter: Path) -> bool:
    """Whether the adapter is a learned prompt, checked before any weights are loaded."""
    with warnings.catch_warnings(), suppress(*ADAPTER_ERRORS):  # errors are reported when it is loaded
        warnings.simplefilter("ignore")
        return PeftConfig.from_pretrained(str(adapter)).is_prompt_learning
    return False


def _tokenizer(adapter: Path | None, section: ModelSection, trust: Trust) -> Tokenizer:
    """Load the adapter's own tokenizer if it has one, else the base's; the chat template likewise."""
    if adapter is None:
        return load_tokenizer(section, trust=trust)
    own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(adapter)) if own else section, trust=trust)
    template = adapter / "chat_template.jinja"
    if not own and template.is_file():
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {template}: {error}") from None
    elif own and tokenizer.chat_template is None:
        tokenizer.chat_template = load_tokenizer(section, trust=trust).chat_template
    return tokenizer


def _load(
    section: ModelSection, hardware: Hardware, tokenizer: Tokenizer, bits: int, trust: Trust
) -> tuple[PreTrainedModel, str, Quantization | None]:
    """Load a model; return it with its fingerprint and its 4-bit quantization, if any."""
    if bits == 16:
        return *load_unquantized(section, hardware, trust), None
    loaded = load_model(section, hardware, tokenizer, trust)
    return loaded.model, loaded.fingerprint, loaded.quantization


def _with_adapter(model: PreTrainedModel, folder: Path, section: ModelSection, compare: bool) -> PeftModel:
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"there is no {folder / ADAPTER_WEIGHTS[0]}")
    fit_embedding(model, folder, files_here(section.model_name_or_path, section.revision), compare)
    base = model.name_or_path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuned = PeftModel.from_pretrained(model, folder).eval()
        except ADAPTER_ERRORS as error:
            raise UserError(
                f"cannot load the adapter {folder} on {base}: {first_line(error)}",
                "is it damaged, or was it trained on another model?",
            ) from error
    # PEFT only warns of missing weights, and the adapter would have no effect there.
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise UserError(
            f"the adapter {folder} does not fit {base}: it lacks weights for some of its layers",
            "was it trained on another model?",
        )
    return tuned
