"""Targets for files that users write: recipes, data, templates, as `validate`, `preview` and `train` read them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.fuzz.basics import command, named, tiny
from tests.fuzz.contract import Target

EVERY_SECTION: dict[str, Any] = {
    "model": {"model_name_or_path": "model", "revision": None, "dtype": "auto"},
    "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "data": {
        "train_dataset": ["a.jsonl", {"path": "*.jsonl", "weight": 2, "fields": {"text": "q"}, "roles": {"x": "tool"}}],
        "eval_dataset": "b.jsonl",
        "chat_template": "t.jinja",
    },
    "proxy": {"source": "mixed", "num_samples": 8, "statistics_memory": 0.5},
    "gate": {"rule": "step", "places": ["a_start", "a_step"], "gate_lambda": 16.0},
    "training": {"output_dir": "run", "learning_rate": 2e-4, "max_steps": 5, "save_steps": 2, "optim": "auto"},
    "evaluation": {"metric": "regex", "metric_pattern": "[0-9]+", "steps": 1, "general_text": ["t.jinja"], "max_kl": 1},
    "export": {"adapter_dtype": "bfloat16"},
    "logging": {"report_to": "none", "run_name": "name"},
}  # fmt: skip


def build_recipe(folder: Path) -> None:
    from folora_q.recipe.strict_yaml import dump_yaml

    (folder / "model").mkdir()
    for name in ("a.jsonl", "b.jsonl", "t.jinja", "model/config.json"):
        (folder / name).write_text("{}\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(dump_yaml(EVERY_SECTION), encoding="utf-8")


def read_recipe(folder: Path, file: str) -> None:
    command("train", folder / file, "--dry-run")


# Data

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "2"},
]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT}, {"messages": CHAT[1:]}, {"messages": [*CHAT, *CHAT[1:]]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1}] * 3,
    "alpaca": [{"instruction": "say", "input": "a", "output": "b", "system": None}] * 3,
    "prompt_completion": [{"prompt": "a", "completion": "b"}, {"prompt": "é", "completion": "c\n"}],
    "chats": [{"prompt": CHAT[:2], "completion": CHAT[2:]}] * 2,
    "text": [{"text": "one line"}, {"text": "two\nlines"}],
}


def build_data(folder: Path) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "chats.json").write_text(json.dumps({"version": 1, "rows": ROWS["messages"]}), encoding="utf-8")
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (folder / f"pairs{ending}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS["prompt_completion"] * 3)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS["messages"]), folder / "chats.parquet")
    many = pyarrow.table(
        {"prompt": ["a", "b"] * 9, "completion": ["c", "d"] * 9, "at": pyarrow.array(range(18), "date64")}
    )
    parquet.write_table(many, folder / "pairs.parquet", compression="zstd")
    lines = (folder / "messages.jsonl").read_bytes() * 9
    for ending, pack in PACKERS.items():
        (folder / f"packed.jsonl{ending}").write_bytes(pack(lines))
    (folder / "prose.txt").write_text("A line of prose.\n" * 20, encoding="utf-8")


def read_data(folder: Path, file: str) -> None:
    """Read rows and tokenize them, as `validate`, `preview` and `train` do."""
    from folora_q.data.loading import examine, read_task_data
    from folora_q.errors import UserError
    from folora_q.recipe.dataset import DataSection

    path = str(folder / file)
    try:
        task = read_task_data(DataSection(train_dataset=[path], eval_size=0.3, on_error="skip"), seed=0)
    except UserError:
        task = None
    else:
        examples = [*task.train, *task.heldout]
        if sum(len(str(example)) for example in examples) < 100_000:  # otherwise the tokenizer takes most of the time
            encode(examples)
    section = DataSection(train_dataset=[path])
    examine(section.train_dataset[0], 1000, "raise")


def encode(examples: list[Any]) -> None:
    from folora_q.data.encode import Encoder
    from folora_q.data.rows import RowError
    from folora_q.models.tokenizer import load_tokenizer
    from folora_q.recipe.schema import ModelSection

    encoder = Encoder(cache(load_tokenizer)(ModelSection(model_name_or_path=str(tiny()))))
    encoder.prepare_chats()
    for example in examples:
        try:
            encoder(example)
        except RowError:
            continue


# Chat templates


def build_template(folder: Path) -> None:
    shutil.copyfile(tiny() / "chat_template.jinja", folder / "t.jinja")


def read_template(folder: Path, file: str) -> None:
    from folora_q.data.encode import Encoder
    from folora_q.data.examples import Chat
    from folora_q.data.rows import RowError
    from folora_q.data.templates import read_template
    from folora_q.models.tokenizer import load_tokenizer
    from folora_q.recipe.schema import ModelSection

    template = read_template(str(folder / file))
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(tiny())), template)
    encoder = Encoder(tokenizer, template_name=f"the chat template {folder / file}")
    encoder.prepare_chats()
    try:
        encoder(Chat("a row", CHAT))
    except RowError:
        return


TARGETS = [
    Target("recipe", build_recipe, {"recipe.yaml": "yaml"}, read_recipe),
    Target(
        "data",
        build_data,
        named("jsonl", *(f"{name}.jsonl" for name in ROWS))
        | named("csv", "pairs.csv", "pairs.tsv")
        | named("parquet", "chats.parquet", "pairs.parquet")
        | named("compressed", *(f"packed.jsonl{ending}" for ending in PACKERS))
        | {"chats.json": "rows", "prose.txt": "text"},
        read_data,
        large=True,
    ),
    Target("template", build_template, {"t.jinja": "text"}, read_template, rate=4),
]
