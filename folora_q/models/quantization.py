"""Quantize and dequantize a weight as 4-bit training does, through bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import BitsAndBytesConfig

from folora_q.models.stored_quantization import StoredQuantization

CHOICES: dict[str, tuple[object, ...]] = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "dtype": ("bfloat16", "float16", "float32"),
    "prequantized": (False, True),
}


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized in training.

    Attributes:
        dtype: that of the weights before quantization, which is also the compute dtype.
        skip_modules: names of modules that are left in 16 bits; None: transformers' own choice.
        prequantized: the base was published in 4 bits, with these settings.
    """

    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    dtype: str = "bfloat16"
    skip_modules: tuple[str, ...] | None = None
    prequantized: bool = False

    @classmethod
    def of_checkpoint(cls, stored: StoredQuantization, dtype: str) -> Quantization:
        """Return the quantization of a checkpoint that was saved in 4 bits.

        Args:
            dtype: the compute dtype.
        """
        return cls(stored.quant_type, stored.double_quant, dtype, stored.skipped, True)

    def __str__(self) -> str:
        return self.bnb_4bit_quant_type + ", as the checkpoint was saved" * self.prequantized

    def config(self) -> BitsAndBytesConfig:
        """Return the configuration with which transformers loads such a model."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
            llm_int8_skip_modules=None if self.skip_modules is None else list(self.skip_modules),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for adapter_config.json; `from_dict` reads them."""
        found: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "dtype": self.dtype,
        }
        if self.skip_modules is not None:
            found["llm_int8_skip_modules"] = list(self.skip_modules)
        return found | ({"prequantized": True} if self.prequantized else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quantization:
        """Read what `to_dict` returns; missing settings have their defaults.

        Raises:
            ValueError: a value is invalid; the message is the end of a sentence.
        """
        known = {name: values[name] for name in CHOICES if name in values}
        for name, value in known.items():
            if value not in CHOICES[name]:
                raise ValueError(f"sets {name} to something other than {', '.join(map(str, CHOICES[name]))}")
        skipped = values.get("llm_int8_skip_modules")
        if skipped is not None:
            if not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
                raise ValueError("sets llm_int8_skip_modules to something other than a list of names")
            known["skip_modules"] = tuple(skipped)
        return cls(**known)

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return the weight as a 4-bit layer uses it: quantized and dequantized by bitsandbytes itself.

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
