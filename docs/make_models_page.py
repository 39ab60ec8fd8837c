"""Writes docs/models.md from what came of every tiny model: `PYTHONPATH=. .venv/bin/python docs/make_models_page.py`.

It takes a few minutes. tests/zoo compares its rows with what comes of the models there.
"""

from __future__ import annotations

import datetime
import gc
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.zoo.walk import Walk

TARGET = Path(__file__).with_name("models.md")
LIBRARIES = ("transformers", "peft", "bitsandbytes", "trl", "torch")
HEAD = """# Models

Which architectures can be fine-tuned, and which of their layers are. Each row is a tiny model of that architecture with
random weights, made on {date} on a CPU, with {versions}. It was taken
through `validate`, `estimate`, `train` (gated, plain, and resumed from a checkpoint), `eval`, `merge` with its proof,
and `chat`; the merged model's logits were compared with PEFT's adapter on the base in 4 bits, as plain transformers
loads it. No published weights were used: nothing here says how well an architecture learns, or what a GPU makes of it.

| model | class of transformers | works | adapters on | no adapters on |
|---|---|---|---|---|
"""
FOOT = """
- **Adapters** go on the linear layers of the language model. `train` names what is left without one, and what stays in
  16 bits, with its share of the weights.
- **Experts** of a mixture are one tensor for all of them in transformers 5. bitsandbytes' 4-bit layers do not take
  that, and PEFT's adapter for it (`target_parameters`) makes the change of every expert anew at each step. So experts
  and routers are not adapted, and stay in 16 bits: `estimate` says what that takes. In some of these models PEFT takes
  the linear layers of a dense MLP or of a shared expert for experts, by their names; those have no adapter either.
- **The routers' balancing loss** is left out unless `training.router_aux_loss_coef` asks for it.
- **Models that also see or hear** are trained on text. Their language model alone is adapted; the rest stays as it is,
  and is in the merged model.
- **Checkpoints that bitsandbytes saved in 4 bits** keep their own quantization, with the modules that it leaves out,
  whatever the recipe says. They merge from their own weights, decoded. An adapter that was trained on one can also be
  merged into the 16-bit model that it was made of (`merge --base-model`): the proof then compares the merged model with
  the one that was trained.
- **Embeddings and output layer** are tied where the model's class ties them. A merge of an adapter that changes one of
  the two parts them, as PEFT does.
- **GGUF** files are read where transformers reads their architecture, turned into 16 bits, and quantized anew.

Made by `docs/make_models_page.py` from `tests/zoo/members.py`; do not edit.
"""


def row(found: Walk) -> str:
    """A line of the table."""
    refused = found.refused.partition("cannot be fine-tuned here: ")[2]
    cells = (
        found.member.title,
        f"`{found.member.architecture}`",
        f"no: {refused}" if refused else "yes",
        ", ".join(_short(found.adapted)),
        ", ".join(found.left),
    )
    return "| " + " | ".join(cells) + " |"


def _short(names: list[str]) -> list[str]:
    """The last parts of layers' names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def main() -> None:
    """Take every member through everything, and write the page."""
    from tests.zoo.members import MEMBERS
    from tests.zoo.walk import walk

    gc.freeze()  # the libraries; a run collects garbage, and would look through all of them
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    head = HEAD.format(date=datetime.date.today().isoformat(), versions=versions)
    rows = []
    for name in MEMBERS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(walk(name, Path(folder))) + "\n")
    TARGET.write_text(head + "".join(rows) + FOOT, encoding="utf-8")


if __name__ == "__main__":
    main()
