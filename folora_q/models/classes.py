"""Choose the transformers class that loads a configuration."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass


def auto_class(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """Return the class for text; for a vision-language model without one, the class that it was published as."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # which raises an error that says so
