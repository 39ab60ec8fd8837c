"""Check what `model.adapter` names: a run or a LoRA adapter that another can be trained on. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folora_q.recipe.paths import NotFoundError, absolute, exists, near, short
from folora_q.storage.untrusted import read_object

CONFIG = "adapter_config.json"
FORMS = "name a run folder, or the folder of a LoRA adapter"
# Settings of PEFT with which an adapter is more than products s B A of linear layers.
MORE_THAN_PRODUCTS = ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters")


def adapter_in(path: Path) -> Path:
    """Return the adapter of a run folder, or the folder itself."""
    return path / "adapter" if (path / "run.json").is_file() else path


def find_adapter(folder: Path, value: str) -> str:
    """Return the absolute path of a run or an adapter that another adapter can be trained on.

    Args:
        folder: the folder that a path is relative to.

    Raises:
        NotFoundError: it is neither, or more than a plain LoRA.
    """
    path = absolute(folder, value)
    if not exists(path) or not path.is_dir():
        raise NotFoundError(f"no run or adapter at {short(path)}{near(path)}", FORMS)
    config = adapter_in(path) / CONFIG
    if not config.is_file():
        if config.parent == path:
            raise NotFoundError(f"{path} holds neither run.json nor {CONFIG}", FORMS)
        raise NotFoundError(f"the run in {path} has no adapter yet", f"complete it: folora-q train {path} --resume")
    try:
        values = read_object(config)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"{short(config)} cannot be read: {error}", FORMS) from None
    _require_products(path, values)
    return str(path)


def rank_in(path: Path) -> int:
    """Return the usual rank of an adapter that `find_adapter` has accepted; 0 if its file does not say."""
    try:
        rank = read_object(adapter_in(path) / CONFIG).get("r")
    except (OSError, ValueError):
        return 0
    return rank if type(rank) is int else 0


def _require_products(path: Path, config: dict[str, Any]) -> None:
    merged = f"merge it (folora-q merge {path}) and name the merged model as model.model_name_or_path"
    if config.get("peft_type") != "LORA":
        raise NotFoundError(f"{path} is not a LoRA adapter: its peft_type is {short(config.get('peft_type'))}", FORMS)
    used = [name for name in MORE_THAN_PRODUCTS if config.get(name)]
    if used or config.get("bias", "none") != "none":
        what = used[0] if used else "biases"
        raise NotFoundError(f"{path} was trained with {what}, and only a plain LoRA can be stacked on", merged)
