"""`folora-q explain`: what a section or a key of the recipe means."""

from __future__ import annotations

import rich_click as click
from rich.markup import escape
from rich.padding import Padding

from folora_q.cli.console import out
from folora_q.recipe.explain import KeyFacts, SectionFacts, explain, sections


@click.command("explain")
@click.argument("name", metavar="KEY", required=False, help="A key such as training.learning_rate, or a section.")
def command(name: str | None) -> None:
    """Explain a KEY of the recipe: its meaning, type, default and allowed values.

    With the name of a section, list its keys; without a name, list the sections.
    """
    if name is None:
        _print_sections()
        return
    found = explain(name)
    if isinstance(found, SectionFacts):
        _print_section(found)
    else:
        _print_key(found)


def _print_sections() -> None:
    found = sections()
    width = max(len(section.name) for section in found)
    for section in found:
        out.print(f"[cyan]{section.name:{width}}[/]  {escape(section.text)}", soft_wrap=True)
    out.print("\nfolora-q explain training                  [dim]lists the keys of a section[/]")
    out.print("folora-q explain training.learning_rate    [dim]explains one of them[/]")


def _print_section(section: SectionFacts) -> None:
    out.print(f"[bold]{section.name}[/]  {escape(section.text)}\n", soft_wrap=True)
    for key in section.keys:
        if key.of_source and key.name.endswith(".path"):
            out.print("\n[bold]a source of rows[/]  in train_dataset and eval_dataset\n")
        out.print(f"[cyan]{key.name.partition('.')[2]}[/]  [dim]{escape(_values(key))}[/]", soft_wrap=True)
        out.print(Padding(escape(key.text), (0, 0, 0, 4), expand=False))


def _print_key(key: KeyFacts) -> None:
    out.print(f"[bold cyan]{key.name}[/]  [dim]{escape(_values(key))}[/]\n", soft_wrap=True)
    out.print(escape(key.text))
    if key.of_source:
        name = key.name.partition(".")[2]
        out.print(f"\n[dim]a key of a source: train_dataset: {escape(f'{{path: FILE, {name}: ...}}')}[/]")
    else:
        out.print(f"\n[dim]for one run: folora-q train RECIPE {key.name}=VALUE[/]", soft_wrap=True)


def _values(key: KeyFacts) -> str:
    """Describe the type of a key, or its values, and its default."""
    kind = f"one of {', '.join(key.choices)}" if len(key.choices) > 1 else key.kind
    default = "required" if key.default is None else f"default: {key.default}"
    return f"{kind}; {default}"
