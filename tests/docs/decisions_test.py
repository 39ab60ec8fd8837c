"""docs/decisions/: every record has a status and a date, and the index lists it as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"
RECORDS = sorted(FOLDER.glob("[0-9]*.md"))
NUMBERS = [path.name[:4] for path in RECORDS]
SECTIONS = ["Context", "Decision", "Evidence", "Consequences"]


def field(text: str, name: str) -> str:
    found = re.search(rf"^- {name}: (.+)$", text, re.MULTILINE)
    assert found, f"no line `- {name}: ...`"
    return found[1]


def index_rows() -> list[str]:
    return [line for line in (FOLDER / "README.md").read_text("utf-8").splitlines() if line.startswith("| [")]


def test_records_are_numbered_without_gaps() -> None:
    assert [int(number) for number in NUMBERS] == list(range(1, len(RECORDS) + 1))


@pytest.mark.parametrize("path", RECORDS, ids=NUMBERS)
def test_a_record_is_complete_and_in_the_index(path: Path) -> None:
    text = path.read_text("utf-8")
    number = path.name[:4]
    title = re.match(rf"# {number}\. (.+)\n", text)
    assert title, "the first line is `# NNNN. Title`"
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    date = field(text, "Date")[:10]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    status = field(text, "Status")
    replaced = re.fullmatch(r"superseded by (\d{4})", status)
    assert status == "accepted" or replaced and replaced[1] in NUMBERS and replaced[1] > number
    if replaced:
        target = RECORDS[NUMBERS.index(replaced[1])].name
        status = f"superseded by [{replaced[1]}]({target})"
    assert f"| [{number}]({path.name}) | {title[1]} | {status} | {date} |" in index_rows()


def test_the_index_lists_nothing_else() -> None:
    assert len(index_rows()) == len(RECORDS)
