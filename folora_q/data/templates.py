"""Chat templates: the model's own, a file, or one by name. Reads files only; renders nothing."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from folora_q.errors import UserError

OURS = Path(__file__).with_name("chat_templates")
# TRL's training variants of templates, which are not offered.
TRAINING = "_training"


def template_names() -> dict[str, Path]:
    """Return the templates that a recipe can name, ours and TRL's, by name; TRL is not imported."""
    found: dict[str, Path] = {}
    trl = find_spec("trl")
    folders = [Path(place) / "chat_templates" for place in (trl.submodule_search_locations or [] if trl else [])]
    for folder in [*folders, OURS]:
        found |= {path.stem: path for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith(TRAINING)}
    return dict(sorted(found.items()))


def read_template(name_or_path: str) -> str:
    """Return the text of a template.

    Raises:
        UserError: it is neither a known name nor a file, or not UTF-8 text.
    """
    path = Path(name_or_path)
    if not path.is_absolute():
        names = template_names()
        if name_or_path not in names:
            near = get_close_matches(name_or_path, names, n=1)
            raise UserError(
                f"`data.chat_template`: there is no template named {name_or_path!r}"
                + (f"; did you mean {near[0]}?" if near else ""),
                f"name a .jinja file, or one of {', '.join(names)}",
            )
        path = names[name_or_path]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`data.chat_template`: cannot read {path}: {error}") from None
