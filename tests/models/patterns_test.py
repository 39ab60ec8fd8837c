"""Regular expressions in an adapter's configuration: those that people write, and those that never end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folora_q.errors import UserError
from folora_q.models.patterns import check_patterns

PATH = Path("adapter_config.json")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "(a+)+"], "exclude_modules": None},  # of a list, the ends are compared
        {"target_modules": r".*language_model.*\.(self_attn|mlp)\.(q_proj|up_proj)"},
        {
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
        },
        {"rank_pattern": {"q_proj": 2, r"^model\.layers\.\d+\.mlp": 4}, "alpha_pattern": {}},
    ],
)
def test_what_people_write(config: dict[str, Any]) -> None:
    check_patterns(PATH, config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules holds .* take forever to match"),
        ({"exclude_modules": r"(\w|\.|\w)*!"}, "exclude_modules holds .* take forever to match"),
        ({"layers_pattern": "(a|a){30}b"}, "layers_pattern holds .* take forever to match"),
        ({"rank_pattern": {".*" * 20 + "!": 2}}, "rank_pattern holds .* take forever to match"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern holds \(, which is not a regular expression"),
    ],
)
def test_what_would_never_end(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"adapter_config.json: {reason}"):
        check_patterns(PATH, config)
