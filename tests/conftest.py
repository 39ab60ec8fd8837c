"""Tiny models made on the fly. Nothing here, or in any test, asks a hub."""

from __future__ import annotations

import gc
import os
import signal

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and rich prefers it to the terminal's own width
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "FOLORA_Q_TEST_ON_GPU" not in os.environ:  # tiny models gain nothing there, and forked children cannot use it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they bring

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from folora_q.progress import TrainingEvent, Unit

os.fsync = lambda fd: None  # no test cuts the power, and a disk takes milliseconds for each file
# What a shell starts in the background ignores Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Files of few and long tests come first, so that the processes end at about the same time (see `make test`).
LONG = ("zoo/", "faults/", "demo_model_test.py", "training/", "benchmarks/", "cli/", "evaluation/", "export/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix()
        return next((number for number, start in enumerate(LONG) if name.startswith(start)), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FOLORA_Q_CACHE", str(tmp_path / "cache"))


def tiny_tokenizer(bos: bool = True, chat: bool = True):
    """A tokenizer over bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [("t", "h"), ("i", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(folder: Path, *, bos: bool = True, chat: bool = True, seed: int = 0) -> Path:
    """A Llama of 2 layers and 64 channels over bytes, with random weights, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(bos, chat)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,  # larger than usual, so that an untrained model still prefers some bytes
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import folora_q.training.trainer  # noqa: F401  (and with it all that a run imports)

    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    gc.freeze()  # a run collects garbage, and would look through all of torch and transformers for it
    return folder


def random_gate(dim: int, rank: int = 8, gate_lambda: float = 1.0):
    """A gate between two random covariances, with quotients on both sides of 1."""
    import torch

    from folora_q.core import CovarianceSketch, SpectralGate

    generator = torch.Generator().manual_seed(dim)
    covariances = []
    for _ in range(2):
        sketch = CovarianceSketch(dim, rank)
        mix = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -2, dim)
        sketch.update(torch.randn(256, dim, generator=generator) @ mix.T)
        covariances.append(sketch.covariance())
    return SpectralGate.from_covariances(*covariances, gate_lambda=gate_lambda)


class Silent:
    """A Progress that remembers what it was told, and counts what was done by stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.events: list[TrainingEvent] = []
        self.stages: dict[str, list[int]] = {}
        self.units: dict[str, Unit] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def show(self, event: TrainingEvent) -> None:
        self.events.append(event)

    @contextmanager
    def stage(self, title: str, total: int | None, unit: Unit = "units") -> Iterator[Callable[[int], None]]:
        self.units[title] = unit
        done = self.stages.setdefault(title, [total or 0])
        yield done.append


def run_out_of_memory_over(rows: int, count: list[int]) -> Callable[..., None]:
    """A forward pre-hook for a model: memory runs out where a batch has more rows; `count` gets every batch's."""

    def hook(module, args, kwargs) -> None:
        taken = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        count.append(len(taken))
        if len(taken) > rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    return hook


@pytest.fixture
def recipe_file(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe of a few steps on the tiny model, with its data beside it; the run goes to tmp_path/run."""
    return write_recipe(tmp_path, tiny_folder)


@pytest.fixture
def pairs_file(recipe_file: Path) -> Path:
    """The recipe on pairs of answers of unequal lengths, for training.objective dpo."""
    import json

    for name, rows in (("train.jsonl", range(12)), ("heldout.jsonl", range(20, 36))):
        lines = [
            {
                "prompt": [{"role": "user", "content": f"say {i}"}],
                "chosen": [{"role": "assistant", "content": f"it is {i}" + " indeed" * (i % 3)}],
                "rejected": [{"role": "assistant", "content": f"{i + 1}, I think" + "!" * (i % 5)}],
            }
            for i in rows
        ]
        (recipe_file.parent / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return recipe_file


@pytest.fixture
def labelled_file(recipe_file: Path) -> Path:
    """The recipe on answers with a label, for training.objective kto; two of three are desirable."""
    import json

    for name, rows in (("train.jsonl", range(12)), ("heldout.jsonl", range(20, 59))):
        lines = []
        for i in rows:
            said = f"it is {i}" + " indeed" * (i % 4) if i % 3 else f"{i + 1}, I think"
            turns = [{"role": "user", "content": f"say {i}"}], [{"role": "assistant", "content": said}]
            lines.append({"prompt": turns[0], "completion": turns[1], "label": i % 3 != 0})
        (recipe_file.parent / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return recipe_file


def write_recipe(folder: Path, model: Path) -> Path:
    """recipe.yaml in a folder, with its data beside it; the run goes to run in that folder."""
    import json

    import yaml

    from folora_q.evaluation.loss import GENERAL_TEXTS

    (folder / "prose.txt").write_text(GENERAL_TEXTS["prose"].read_text("utf-8")[:2000], encoding="utf-8")
    for name, rows in (("train.jsonl", range(12)), ("heldout.jsonl", range(20, 24))):
        lines = [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
            for i in rows
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 16},
        "data": {"train_dataset": "train.jsonl", "eval_dataset": "heldout.jsonl"},
        # Without public text, whose windows are most of a tiny run's time; tests/calibration has it.
        "proxy": {
            "source": "mixed",
            "num_samples": 4,
            "num_heldout_samples": 2,
            "max_new_tokens": 24,
            "public_share": 0,
        },
        "gate": {"rule": "step", "rank": 8, "oversampling": 4, "num_task_samples": 6, "refresh_every": 2},
        "training": {
            "output_dir": str(folder / "run"),
            "learning_rate": 1e-2,
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
        "logging": {"logging_steps": 2},
        "evaluation": {"metric": "exact_match", "max_new_tokens": 8, "general_text": "prose.txt"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
