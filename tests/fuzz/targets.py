"""All fuzz targets by name, for tests/fuzz/fuzz_test.py and tests/campaigns/fuzz.py.

Libraries are imported when a target is built: a recipe is read without torch.
"""

from __future__ import annotations

from tests.fuzz import data_targets, model_targets, run_targets
from tests.fuzz.contract import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (*data_targets.TARGETS, *model_targets.TARGETS, *run_targets.TARGETS)
}
