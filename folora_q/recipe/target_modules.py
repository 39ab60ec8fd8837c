"""Check the layer names in `adapter` against the names that a model has. Needs no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from folora_q.recipe.adapter import ALL_LINEAR, AdapterSection

# The place of a name in a recipe, and what is wrong with it.
Finding = tuple[tuple[str | int, ...], str]
# The maximum number of names in a message.
MAX_NAMES = 16


@dataclass(frozen=True)
class Modules:
    """The modules of a model that a recipe's adapter section may name, by their full names.

    Attributes:
        linears: linear layers, without the output layer.
        embeddings: embeddings of tokens and of positions, the token embedding first.
        head: the output layer.
        tied: the output layer shares the token embedding's weight.
        others: other modules, as far as they are known: norms, and modules that contain others.
    """

    linears: Sequence[str]
    embeddings: Sequence[str]
    head: str
    tied: bool
    others: Sequence[str] = ()

    @property
    def endings(self) -> list[str]:
        """The last parts of the linear layers' names, each once."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.linears))


def adapter_findings(section: AdapterSection, modules: Modules) -> list[Finding]:
    """Return what is wrong with the layer names in `adapter`: missing in the model, or of another kind."""
    found: list[Finding] = [*_targets(section, modules), *_excluded(section, modules), *_saved(section, modules)]
    if not found and not targeted(section, modules):
        found = [(("adapter", "exclude_modules"), "`adapter.exclude_modules` leaves no layer to put an adapter on")]
    return found


def targeted(section: AdapterSection, modules: Modules) -> list[str]:
    """Return the names of the layers that get an adapter."""
    wanted = section.target_modules
    chosen = modules.linears if wanted == ALL_LINEAR else filter(matcher(wanted), [*modules.linears, modules.head])
    excluded = matcher(section.exclude_modules or [])
    return [name for name in chosen if not excluded(name)]


def matcher(names: str | Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether PEFT matches a full name: by endings in a list, or a regular expression."""
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(_is(name, ending) for ending in names)


def _is(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _targets(section: AdapterSection, modules: Modules) -> Iterator[Finding]:
    wanted, place = section.target_modules, ("adapter", "target_modules")
    if wanted == ALL_LINEAR:
        return
    if isinstance(wanted, str):
        yield from ((place, message) for message in _pattern_findings(wanted, modules))
        return
    for index, ending in enumerate(wanted):
        if message := _target(ending, modules):
            yield (*place, index), f"`adapter.target_modules`: {message}"


def _target(ending: str, modules: Modules) -> str | None:
    """Return what is wrong with a name in `target_modules`."""
    if _is(modules.head, ending) and modules.tied:
        return tied_head(ending, modules)
    if any(_is(name, ending) for name in (*modules.linears, modules.head)):
        return None
    if any(_is(name, ending) for name in modules.embeddings):
        return f"{ending} is an embedding, not a linear layer; `adapter.modules_to_save: [{ending}]` trains it in full"
    inside = [name for name in modules.linears if f".{ending}." in f".{name}"]
    if inside:
        names = dict.fromkeys(name.rpartition(".")[2] for name in inside)
        return f"{ending} contains layers but is not one; name the layers: {_listed(names)}"
    if ending == ALL_LINEAR:
        return f"{ALL_LINEAR} must not be in a list: `target_modules: {ALL_LINEAR}`"
    if any(_is(name, ending) for name in modules.others):
        return f"{ending} is not a linear layer; {_linear_layers(modules)}"
    if any(map(matcher_or_none(ending), modules.linears)):
        return f"{ending} is a regular expression, which must not be in a list: `target_modules: '{ending}'`"
    return f"the model has no linear layer {ending}{_nearest(ending, modules)}; {_linear_layers(modules)}"


def matcher_or_none(pattern: str) -> Callable[[str], bool]:
    """Return a matcher for a pattern; an invalid regular expression matches nothing."""
    try:
        return matcher(pattern)
    except re.error:
        return lambda name: False


def tied_head(ending: str, modules: Modules) -> str:
    """Explain why the output layer of this model cannot have an adapter."""
    embedding = modules.embeddings[0].rpartition(".")[2]
    return (
        f"{ending} has no weight of its own: in this model it is tied to {embedding}, and an adapter on one of the two "
        f"would untie them; `adapter.modules_to_save: [{embedding}]` trains both as one"
    )


def _pattern_findings(pattern: str, modules: Modules) -> Iterator[str]:
    hits = matcher(pattern)
    if modules.tied and hits(modules.head):
        yield f"`adapter.target_modules`: {pattern} matches {tied_head(modules.head, modules)}"
    wrong = [name for name in (*modules.embeddings, *modules.others) if hits(name)]
    if wrong:
        yield (
            f"`adapter.target_modules`: the regular expression {pattern} also matches {wrong[0]}, which is not a "
            f"linear layer; {_linear_layers(modules)}"
        )
    elif not any(map(hits, (*modules.linears, modules.head))):
        example = modules.linears[0] if modules.linears else modules.head
        yield (
            f"`adapter.target_modules`: the regular expression {pattern} matches no layer's full name, such as "
            f"{example}; {_linear_layers(modules)}"
        )


def _excluded(section: AdapterSection, modules: Modules) -> Iterator[Finding]:
    place, excluded = ("adapter", "exclude_modules"), section.exclude_modules or []
    without = section.model_copy(update={"exclude_modules": None})
    candidates = targeted(without, modules)
    if isinstance(excluded, str):
        if not any(map(matcher(excluded), candidates)):
            yield place, f"`adapter.exclude_modules`: {excluded} matches no layer that would get an adapter"
        return
    for index, ending in enumerate(excluded):
        if any(_is(name, ending) for name in candidates):
            continue
        known = any(_is(name, ending) for name in (*modules.linears, modules.head))
        reason = "has no adapter anyway" if known else f"is not a linear layer of the model{_nearest(ending, modules)}"
        yield (*place, index), f"`adapter.exclude_modules`: {ending} {reason}"


def _saved(section: AdapterSection, modules: Modules) -> Iterator[Finding]:
    whole = [*modules.embeddings, modules.head]
    adapted = set(targeted(section, modules))
    for index, ending in enumerate(section.modules_to_save or []):
        place, what = ("adapter", "modules_to_save", index), "`adapter.modules_to_save`"
        hits = [name for name in whole if _is(name, ending)]
        if not hits:
            linear = any(_is(name, ending) for name in modules.linears)
            reason = (
                f"{ending} is in 4 bits, and can only be trained by an adapter: `adapter.target_modules`"
                if linear
                else f"the model has no embedding and no output layer {ending}{_nearest(ending, modules, whole)}"
            )
            names = _listed(dict.fromkeys(name.rpartition(".")[2] for name in whole))
            yield place, f"{what}: {reason}; {names} can be trained in full"
        elif both := next((name for name in hits if name in adapted), None):
            yield place, f"{what}: {both} is also in `adapter.target_modules`; it can only be trained in one way"


def _nearest(name: str, modules: Modules, among: Sequence[str] = ()) -> str:
    """Suggest the layer with the most similar name, as a part of a sentence."""
    names = among or (*modules.linears, modules.head)
    parts = name.count(".") + 1
    known = dict.fromkeys(".".join(full.split(".")[-parts:]) for full in names)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _linear_layers(modules: Modules) -> str:
    return f"its linear layers are {_listed(modules.endings)}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:MAX_NAMES]) + (f" and {len(every) - MAX_NAMES} more" if len(every) > MAX_NAMES else "")
