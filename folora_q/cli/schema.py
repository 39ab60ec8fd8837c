"""`folora-q schema`: the recipe's JSON schema."""

from __future__ import annotations

import rich_click as click

from folora_q.recipe.json_schema import json_schema


@click.command("schema")
def command() -> None:
    """Print the recipe's JSON schema, for completion and checks in editors: `folora-q schema > recipe.schema.json`."""
    click.echo(json_schema(), nl=False)
