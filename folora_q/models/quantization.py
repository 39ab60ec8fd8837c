"""What training in 4 bits makes of a weight: the round trip through bitsandbytes, and which weights go through it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from folora_q.models.trust import NOTHING, Trust

CHOICES: dict[str, tuple[object, ...]] = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "dtype": ("bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class Quantization:
    """How a base was held in training.

    Attributes:
        dtype: that of the weights when they were quantized, which is the compute dtype too.
    """

    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    dtype: str = "bfloat16"

    def to_dict(self) -> dict[str, Any]:
        """For adapter_config.json; `from_dict` reads it back."""
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quantization:
        """From what `to_dict` wrote; what is not there has its default.

        Raises:
            ValueError: a value is none that it could have written; the message is the end of a sentence.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name, choices in CHOICES.items():
            if known.get(name, choices[0]) not in choices:
                raise ValueError(f"sets {name} to something else than {', '.join(map(str, choices))}")
        return cls(**known)

    def round_trip(self, weight: Tensor) -> Tensor:
        """The weight as the 4-bit layer computes with it: quantized and decoded by bitsandbytes itself.

        Args:
            weight: (out, in), 16 or 32 bits.

        Returns:
            The same shape, in `dtype`.
        """
        code, state = quantize_4bit(
            weight.to(getattr(torch, self.dtype)).contiguous(),
            quant_type=self.bnb_4bit_quant_type,
            compress_statistics=self.bnb_4bit_use_double_quant,
        )
        return dequantize_4bit(code, state)


def quantized_weights(folder: str, trust: Trust = NOTHING) -> set[str]:
    """Names of the weights that transformers puts into 4 bits when it loads this model; none is loaded for it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust.remote_code)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
