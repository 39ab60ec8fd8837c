"""Create the tasks `code`, `mathematics` and `constraints`, whose answers can be checked, without downloads.

    python benchmarks/frontier/data/make_tasks.py

code          write functions of the standard library and of three installed packages, from their signature and
              docstring; held-out rows are functions of other modules
mathematics   problems in words or numbers, answered with the working; the answers are computed
constraints   rewrite lists of words under two or three constraints at once; each has one right answer
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from pathlib import Path

HERE = Path(__file__).parent
TRAIN_ROWS, HELDOUT_ROWS = 400, 48
# Characters of a function without its docstring; longer ones exceed the recipes' `max_length`.
MIN_CHARACTERS, MAX_CHARACTERS = 60, 420
# The benchmark measures code on `ast` and `textwrap`, so they are not trained on.
TRAIN_MODULES = (
    "networkx.algorithms",
    "networkx.classes",
    "more_itertools",
    "sympy.ntheory",
    "sympy.combinatorics",
    "sympy.utilities",
    "email",
    "http",
    "collections",
    "statistics",
    "fractions",
    "shutil",
    "inspect",
    "tokenize",
    "string",
    "calendar",
    "random",
    "urllib",
)
HELDOUT_MODULES = ("networkx.generators", "networkx.utils", "sympy.polys", "heapq", "bisect", "operator", "difflib")


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write(name: str, rows: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Code


def code_rows(modules: tuple[str, ...]) -> list[dict]:
    """Return a row for every function with a docstring and a short body, without duplicates."""
    rows = {}
    for module in modules:
        for path in _files(module):
            for function in _functions(path.read_text("utf-8")):
                rows.setdefault(function.name, _code_row(function))
    return [row for row in rows.values() if row is not None]


def _files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed")
    file = Path(spec.origin)
    if file.name != "__init__.py":
        return [file]
    return sorted(path for path in file.parent.rglob("*.py") if "tests" not in path.parts)


def _functions(source: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))


def _code_row(function: ast.FunctionDef) -> dict | None:
    docstring = ast.get_docstring(function)
    if not docstring or function.decorator_list or function.name.startswith("_"):
        return None
    says = " ".join(docstring.split("\n\n")[0].split())
    function.body = function.body[1:]  # the docstring
    if not function.body or not says.isascii() or not 20 <= len(says) <= 160:
        return None
    written = ast.unparse(function)
    if not MIN_CHARACTERS <= len(written) <= MAX_CHARACTERS or "NotImplemented" in written:
        return None
    signature = f"{function.name}({ast.unparse(function.args)})"
    return chat(f"Write the Python function `{signature}`: {says}", f"```python\n{written}\n```")


# Mathematics


def _product(chance: random.Random) -> tuple[str, str, int]:
    a, b = chance.randint(12, 99), chance.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    parts = [(a, part) for part in (tens, ones) if part]
    sums = " + ".join(str(x * y) for x, y in parts)
    working = f"{' + '.join(f'{x} * {y}' for x, y in parts)} = {sums}" + (f" = {a * b}" if len(parts) > 1 else "")
    return f"What is {a} * {b}?", working, a * b


def _equation(chance: random.Random) -> tuple[str, str, int]:
    a, x, b = chance.randint(2, 12), chance.randint(2, 30), chance.randint(1, 60)
    c = a * x + b
    return f"Solve {a}x + {b} = {c}.", f"{a}x = {c} - {b} = {c - b}; x = {c - b} / {a} = {x}", x


def _percentage(chance: random.Random) -> tuple[str, str, int]:
    percent, whole = chance.choice((5, 15, 20, 25, 35, 40, 60, 75)), 20 * chance.randint(2, 60)
    return (
        f"What is {percent} percent of {whole}?",
        f"{percent} * {whole} / 100 = {percent * whole} / 100 = {percent * whole // 100}",
        percent * whole // 100,
    )


def _divisor(chance: random.Random) -> tuple[str, str, int]:
    factor = chance.randint(2, 24)
    a, b = (factor * part for part in chance.sample(range(2, 16), 2))
    a, b = max(a, b), min(a, b)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    return f"What is the greatest common divisor of {a} and {b}?", "; ".join(steps), gcd(a, b)


def _purchase(chance: random.Random) -> tuple[str, str, int]:
    names = chance.sample(("pens", "cups", "books", "lamps", "bags", "hats"), 2)
    counts, prices = [[chance.randint(2, 12) for _ in names] for _ in range(2)]
    paid = 10 * (-(-sum(n * p for n, p in zip(counts, prices, strict=True)) // 10) + chance.randint(0, 3))
    costs = [n * p for n, p in zip(counts, prices, strict=True)]
    bought = " and ".join(f"{n} {name} at {p} euros" for n, name, p in zip(counts, names, prices, strict=True))
    working = "; ".join(f"{n} * {p} = {n * p}" for n, p in zip(counts, prices, strict=True))
    working += f"; {costs[0]} + {costs[1]} = {sum(costs)}; {paid} - {sum(costs)} = {paid - sum(costs)}"
    return f"Someone buys {bought} and pays with {paid} euros. What is the change?", working, paid - sum(costs)


def _fraction(chance: random.Random) -> tuple[str, str, Fraction]:
    a, b = (Fraction(chance.randint(1, 8), chance.randint(2, 9)) for _ in range(2))
    below = a.denominator * b.denominator
    left, right = a.numerator * b.denominator, b.numerator * a.denominator
    working = f"{left}/{below} + {right}/{below} = {left + right}/{below} = {a + b}"
    return f"What is {a} + {b}, in lowest terms?", working, a + b


PROBLEMS: tuple[Callable[[random.Random], tuple[str, str, int | Fraction]], ...] = (
    _product,
    _equation,
    _percentage,
    _divisor,
    _purchase,
    _fraction,
)


def mathematics_rows(number: int, chance: random.Random) -> list[dict]:
    """Return different problems, an equal number of every kind."""
    rows: dict[str, dict] = {}
    while len(rows) < number:
        question, working, answer = PROBLEMS[len(rows) % len(PROBLEMS)](chance)
        rows.setdefault(question, chat(question, f"{working}\nAnswer: {answer}"))
    return list(rows.values())


# Constraints


@dataclass(frozen=True)
class Constraint:
    """A constraint in words, and the function that applies it to a list of words."""

    says: str
    apply: Callable[[list[str]], list[str]]


ORDERS = (
    Constraint("in alphabetical order", sorted),
    Constraint("in reverse order", lambda words: words[::-1]),
    Constraint("from the shortest to the longest", lambda words: sorted(words, key=len)),
)
CHOICES = (
    Constraint("without the first word", lambda words: words[1:]),
    Constraint("only the words of more than six letters", lambda words: [w for w in words if len(w) > 6]),
    Constraint("without words that contain the letter a", lambda words: [w for w in words if "a" not in w]),
)
FORMS = (
    Constraint("in capital letters", lambda words: [w.upper() for w in words]),
    Constraint("each in double quotes", lambda words: [f'"{w}"' for w in words]),
    Constraint("each followed by its number of letters in brackets", lambda words: [f"{w} ({len(w)})" for w in words]),
)
LAYOUTS: dict[str, Callable[[list[str]], str]] = {
    "as a numbered list": lambda words: "\n".join(f"{n}. {w}" for n, w in enumerate(words, 1)),
    "as bullet points": lambda words: "\n".join(f"- {w}" for w in words),
    "separated by semicolons": "; ".join,
    "on one line that begins with Words: and ends with END": lambda words: f"Words: {' '.join(words)} END",
}


def constraint_rows(number: int, words: list[str], chance: random.Random) -> list[dict]:
    """Return rows with different lists, each under constraints of two kinds and a layout."""
    rows: dict[str, dict] = {}
    while len(rows) < number:
        given = [word.lower() for word in chance.sample(words, chance.randint(4, 6))]
        kinds = sorted(chance.sample((0, 1, 2), 2))
        chosen = [chance.choice((CHOICES, ORDERS, FORMS)[kind]) for kind in kinds]
        layout = chance.choice(sorted(LAYOUTS))
        answer = given
        for constraint in chosen:
            answer = constraint.apply(answer)
        if len(answer) >= 2:
            says = ", ".join([*(constraint.says for constraint in chosen), layout])
            prompt = f"Rewrite these words: {', '.join(given)}. Write them {says}."
            rows.setdefault(prompt, chat(prompt, LAYOUTS[layout](answer)))
    return list(rows.values())


def main() -> None:
    chance = random.Random(0)
    heldout, train = code_rows(HELDOUT_MODULES), code_rows(TRAIN_MODULES)
    names = {row["messages"][0]["content"] for row in heldout}
    train = [row for row in train if row["messages"][0]["content"] not in names]
    print(f"code: {len(train)} functions, {len(heldout)} held out", file=sys.stderr)
    write("code-train.jsonl", chance.sample(train, min(TRAIN_ROWS, len(train))))
    write("code-heldout.jsonl", chance.sample(heldout, HELDOUT_ROWS))
    problems = mathematics_rows(TRAIN_ROWS + HELDOUT_ROWS, chance)
    write("mathematics-heldout.jsonl", problems[:HELDOUT_ROWS])
    write("mathematics-train.jsonl", problems[HELDOUT_ROWS:])
    # The words of the task `skill`: its training words for training, its held-out words for the held-out rows.
    for half, rows in (("heldout", HELDOUT_ROWS), ("train", TRAIN_ROWS)):
        lines = (HERE / f"skill-{half}.jsonl").read_text("utf-8").splitlines()
        words = [json.loads(line)["messages"][0]["content"].rpartition(" ")[2] for line in lines]
        write(f"constraints-{half}.jsonl", constraint_rows(rows, words, chance))


if __name__ == "__main__":
    main()
