"""Make pairs for DPO of the demo's bookings: the right JSON is chosen, and one with wrong fields rejected.

python docs/examples/booking_pairs.py recipes/demo pairs
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def wrong(booking: dict[str, Any], chooser: random.Random) -> dict[str, Any]:
    """Return a booking in which one to three fields are plausible and wrong."""
    hour, minute = booking["time"].split(":")
    mistakes = {
        "guests": chooser.choice([n for n in range(1, 9) if n != booking["guests"]]),
        "day": chooser.choice([day for day in DAYS if day != booking["day"]]),
        "time": f"{(int(hour) + 12) % 24:02}:{minute}",  # morning and evening confused
        "seating": "outside" if booking["seating"] == "inside" else "inside",
    }
    return booking | {name: mistakes[name] for name in chooser.sample(list(mistakes), chooser.randint(1, 3))}


def main(source: Path, target: Path) -> None:
    """Write pairs of both files of a folder to another one."""
    target.mkdir(exist_ok=True)
    chooser = random.Random(0)
    for name in ("train", "heldout"):
        with (target / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for line in (source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                *prompt, answer = json.loads(line)["messages"]
                worse = json.dumps(wrong(json.loads(answer["content"]), chooser), separators=(",", ":"))
                pair = {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": worse}]}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
