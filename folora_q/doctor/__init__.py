"""Check whether training can work on this machine, and how to fix what is wrong."""

from folora_q.doctor.checks import CHECKS
from folora_q.doctor.findings import Check, Finding, State, can_train
from folora_q.doctor.redaction import without_user
from folora_q.doctor.runner import Examiner

__all__ = ["CHECKS", "Check", "Examiner", "Finding", "State", "can_train", "without_user"]
