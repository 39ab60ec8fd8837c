"""The list of all checks, in the order in which their findings help most."""

from __future__ import annotations

from functools import partial

from folora_q.doctor.compute import check_compute
from folora_q.doctor.findings import Check
from folora_q.doctor.four_bit import check_four_bit
from folora_q.doctor.gpu import check_gpu
from folora_q.doctor.hub import check_hub
from folora_q.doctor.machine import check_disk, check_memory
from folora_q.doctor.optional_packages import check_flash_attention, check_gguf, check_lm_eval
from folora_q.doctor.packages import STACK, check_other_packages, check_package, check_python

CHECKS = [
    Check("python", check_python),
    *(Check(name, partial(check_package, name)) for name in STACK),
    Check("the rest", check_other_packages),
    Check("gpu", check_gpu),
    Check("precision", check_compute),
    Check("4-bit layers", check_four_bit),
    Check("memory", check_memory),
    Check("disk", check_disk),
    Check("hub", check_hub, needed=False),
    Check("lm-eval", check_lm_eval, needed=False),
    Check("gguf", check_gguf, needed=False),
    Check("flash-attn", check_flash_attention, needed=False),
]
