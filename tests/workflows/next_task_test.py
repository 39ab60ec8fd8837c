"""A second task on a tuned model: what it is compared with, what it holds; it resumes and merges as any run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from folora_q.cli.app import main
from folora_q.models.load import guard_cpu_kernels
from folora_q.runs.result_files import read_evaluation
from folora_q.runs.results import Evaluation, TextKind
from folora_q.workflows.together import predict_interference
from tests.conftest import write_recipe
from tests.faults.commands import assert_the_same_run, at_step, manifest, signalled

QUICK = ("evaluation.max_new_tokens=4", "training.max_steps=4")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def evaluated(folder: Path) -> Evaluation:
    found = read_evaluation(folder / "evaluation.json")
    assert found is not None
    return found


def plain_base(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    guard_cpu_kernels(model)
    return model.eval()


def task_loss(model: torch.nn.Module, folder: Path, rows: Path) -> float:
    """The mean loss of the answers' tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in rows.read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        said = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="none")
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs that all tests share do not use the user's cache either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_Q_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Path]:
    """Folders of two tasks, each with recipe.yaml; the first one is run."""
    root = tmp_path_factory.mktemp("tasks")
    for name in ("first", "second"):
        (root / name).mkdir()
        write_recipe(root / name, tiny_folder)
    for file in ("train.jsonl", "heldout.jsonl"):
        path = root / "second" / file
        path.write_text(path.read_text("utf-8").replace("it is", "that was"), encoding="utf-8")
    assert command("train", root / "first" / "recipe.yaml", *QUICK) == 0
    return root / "first", root / "second"


@pytest.fixture(scope="module")
def second_run(tasks: tuple[Path, Path]) -> Path:
    first, second = tasks
    assert command("train", second / "recipe.yaml", *QUICK, f"model.adapter={first / 'run'}", "adapter.r=2") == 0
    return second / "run"


def test_the_first_tasks_numbers_are_those_of_plain_peft(
    tasks: tuple[Path, Path], second_run: Path, tiny_folder: Path
) -> None:
    found = evaluated(second_run)
    (earlier,) = found.of_kind(TextKind.EARLIER)
    assert earlier.name == "earlier task run" and [score.task for score in found.earlier] == ["earlier task run"]
    rows = tasks[0] / "heldout.jsonl"
    before = PeftModel.from_pretrained(plain_base(tiny_folder), tasks[0] / "run" / "adapter")
    assert earlier.loss.base.value == pytest.approx(task_loss(before, tiny_folder, rows), abs=1e-4)
    after = PeftModel.from_pretrained(plain_base(tiny_folder), second_run / "adapter")
    assert earlier.loss.tuned.value == pytest.approx(task_loss(after, tiny_folder, rows), abs=1e-4)
    (task,) = found.of_kind(TextKind.TASK)
    assert task.loss.tuned.value == pytest.approx(task_loss(after, tiny_folder, tasks[1] / "heldout.jsonl"), abs=1e-4)
    config = json.loads((second_run / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 + 2 and config["base_model_name_or_path"] == str(tiny_folder)


def test_the_text_to_preserve_is_that_of_the_tuned_model_and_of_the_first_task(
    tasks: tuple[Path, Path], second_run: Path
) -> None:
    first, second = tasks
    assert (first / "run" / "proxy.jsonl").read_text() != (second_run / "proxy.jsonl").read_text()
    assert manifest(first / "run")["model"]["fingerprint"] != manifest(second_run)["model"]["fingerprint"]
    other = second / "without"
    changes = (f"model.adapter={first / 'run'}", "adapter.r=2", "proxy.earlier_share=0")
    assert command("train", second / "recipe.yaml", *QUICK, *changes, f"training.output_dir={other}") == 0
    assert (other / "proxy.jsonl").read_text() == (second_run / "proxy.jsonl").read_text()
    gates = [json.loads((run / "gates.json").read_text()) for run in (other, second_run)]
    assert gates[0] != gates[1], "the first task's rows are part of the penalty"


def test_the_page_card_and_console_name_the_earlier_task(second_run: Path, capfd) -> None:
    assert command("report", second_run) == 0
    page = (second_run / "report.html").read_text("utf-8")
    assert "Earlier tasks" in page and "earlier task run: exact match" in page
    card = (second_run / "adapter" / "README.md").read_text("utf-8")
    assert "| earlier task run: loss |" in card and "Holds the earlier adapter `run`" in card
    assert not (second_run / "added" / "README.md").exists()


def test_it_is_evaluated_again_as_it_was_also_without_the_first_run(
    tasks: tuple[Path, Path], second_run: Path, tmp_path: Path, capfd
) -> None:
    assert command("eval", second_run, "--output", tmp_path / "again") == 0
    assert evaluated(tmp_path / "again").texts == evaluated(second_run).texts
    assert evaluated(tmp_path / "again").earlier == evaluated(second_run).earlier
    alone = tmp_path / "alone" / "run"
    shutil.copytree(second_run, alone)
    hidden = tasks[0].with_name("hidden")
    tasks[0].rename(hidden)
    try:
        assert command("eval", alone, "--output", tmp_path / "later") == 0
    finally:
        hidden.rename(tasks[0])
    later = evaluated(tmp_path / "later")
    assert later.of_kind(TextKind.TASK) == evaluated(second_run).of_kind(TextKind.TASK)
    assert later.of_kind(TextKind.GENERATED) == evaluated(second_run).of_kind(TextKind.GENERATED)


def test_it_merges_and_its_parts_alone_do_not(second_run: Path, tiny_folder: Path, tmp_path: Path, capfd) -> None:
    assert command("merge", second_run, "--dtype", "float32", "--output", tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["verified"] is True
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    adapter = PeftModel.from_pretrained(plain_base(tiny_folder), second_run / "adapter")
    logits: list[Tensor] = []
    for model in (merged, adapter):
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-3)
    capfd.readouterr()
    assert command("merge", second_run / "added", "--output", tmp_path / "half") == 2
    assert "is only what was trained on another adapter" in capfd.readouterr().err


@pytest.mark.parametrize("rule", ["step", "frozen"])
def test_it_resumes_bit_for_bit(tasks: tuple[Path, Path], tmp_path: Path, rule: str, monkeypatch, capfd) -> None:
    first, straight, stopped = tmp_path / "first", tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    shutil.copytree(tasks[0] / "run", first)
    given = (tasks[1] / "recipe.yaml", *QUICK, f"model.adapter={first}", f"gate.rule={rule}")
    assert command("train", *given, f"training.output_dir={straight}") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, signalled(signal.SIGINT))
        assert command("train", *given, f"training.output_dir={stopped}") == 130
    assert (stopped / "earlier" / "adapter_config.json").is_file()
    weights = first / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert command("train", *given, f"training.output_dir={stopped}", "--resume") == 2
    assert "model fingerprint" in capfd.readouterr().err
    weights.write_bytes(kept)
    assert command("train", *given, f"training.output_dir={stopped}", "--resume") == 0
    assert_the_same_run(straight, stopped)
    for part in ("adapter", "added", "earlier"):
        names = [folder / part / "adapter_model.safetensors" for folder in (straight, stopped)]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_a_third_task_names_both_earlier_ones(
    tasks: tuple[Path, Path], second_run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    third = tmp_path / "third"
    third.mkdir()
    recipe = write_recipe(third, tiny_folder)
    assert command("train", recipe, *QUICK, f"model.adapter={second_run}", "adapter.target_modules=[v_proj]") == 0
    found = evaluated(third / "run")
    names = ["earlier task run (1)", "earlier task run (2)"]
    assert [text.name for text in found.of_kind(TextKind.EARLIER)] == names
    before = evaluated(second_run)
    (of_first,), (of_second,) = before.of_kind(TextKind.EARLIER), before.of_kind(TextKind.TASK)
    assert found.text(names[0]).loss.base.value == pytest.approx(of_first.loss.tuned.value, abs=1e-4)
    assert found.text(names[1]).loss.base.value == pytest.approx(of_second.loss.tuned.value, abs=1e-4)


def test_an_adapter_from_elsewhere_is_protected_by_what_is_known_of_it(
    tasks: tuple[Path, Path], tmp_path: Path, capfd
) -> None:
    first, second = tasks
    foreign = tmp_path / "foreign"
    shutil.copytree(first / "run" / "adapter", foreign)
    given = (second / "recipe.yaml", *QUICK, f"model.adapter={foreign}", "training.max_steps=1")
    assert command("train", *given, f"training.output_dir={tmp_path / 'unknown'}") == 0
    assert "is not known (model.adapter_data)" in "".join(manifest(tmp_path / "unknown")["warnings"])
    assert not evaluated(tmp_path / "unknown").of_kind(TextKind.EARLIER)
    known = f"model.adapter_data={first / 'recipe.yaml'}"
    assert command("train", *given, known, f"training.output_dir={tmp_path / 'known'}") == 0
    (earlier,) = evaluated(tmp_path / "known").of_kind(TextKind.EARLIER)
    assert earlier.name == "earlier task recipe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.adapter={first}", "model.fsdp=shard"], "must be complete on each GPU"),
        (["model.adapter={first}", "adapter.modules_to_save=[lm_head]"], "could be stacked on the result"),
        (["model.adapter_data=train.jsonl"], "model.adapter, which is not set"),
        (["model.adapter=nowhere"], "no run or adapter at"),
        (["model.adapter=."], "holds neither run.json nor adapter_config.json"),
        (["model.adapter={first}", "training.output_dir={first}"], "is in the folder of this run"),
        (["model.adapter={first}/adapter", "training.output_dir={first}"], "is in the folder of this run"),
    ],
)
def test_what_cannot_work_is_refused_by_validate(
    tasks: tuple[Path, Path], changes: list[str], message: str, capfd
) -> None:
    first, second = tasks
    assert command("validate", second / "recipe.yaml", *(each.format(first=first / "run") for each in changes)) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_validate_reads_the_data_of_the_earlier_task(tasks: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    first, second = tasks
    moved = tmp_path / "moved"
    shutil.copytree(first / "run", moved)
    given = ("validate", second / "recipe.yaml", "gate.rule=frozen", f"model.adapter={moved}")
    assert command(*given) == 0
    assert f"earlier   moved: {first / 'train.jsonl'}: 12 rows of `messages`" in capfd.readouterr().out
    resolved = moved / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text("utf-8").replace("train.jsonl", "gone.jsonl"), encoding="utf-8")
    assert command(*given) == 2
    told = capfd.readouterr().err
    assert "the data of the earlier task moved cannot be read: " in told and "set proxy.earlier_share: 0" in told
    assert command(*given, "proxy.earlier_share=0") == 0
    assert f"no file at {first / 'gone.jsonl'}; it is not measured" in capfd.readouterr().out.replace("\n", "")


def test_an_adapter_of_another_kind_is_refused_by_validate(tasks: tuple[Path, Path], tmp_path: Path, capfd) -> None:
    for settings, message in (({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")):
        folder = tmp_path / message
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
        assert command("validate", tasks[1] / "recipe.yaml", f"model.adapter={folder}") == 2
        assert f"was trained with {message}" in capfd.readouterr().err


@pytest.fixture(scope="module")
def independent(tasks: tuple[Path, Path]) -> tuple[Path, Path]:
    """Both tasks on the base alone, with complete covariances of unweighted tokens."""
    runs = tasks[0] / "independent", tasks[1] / "independent"
    gate = ("gate.covariance=activation", "gate.rank=64", "gate.oversampling=0", "gate.num_task_samples=12")
    for folder, run in zip(tasks, runs, strict=True):
        given = (*QUICK, *gate, "adapter.target_modules=[q_proj,v_proj]", f"training.output_dir={run}")
        assert command("train", folder / "recipe.yaml", *given) == 0
    return runs


def test_interference_is_what_transformers_and_peft_measure(
    tasks: tuple[Path, Path], independent: tuple[Path, Path], tiny_folder: Path, capfd
) -> None:
    on_first, on_second = predict_interference(str(independent[0]), str(independent[1]))
    assert (on_first.of, on_second.of) == tuple(map(str, independent)) and not on_first.unknown
    model = plain_base(tiny_folder)
    tuned = PeftModel.from_pretrained(model, independent[0] / "adapter", adapter_name="first")
    tuned.load_adapter(independent[1] / "adapter", "second")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    inputs: dict[str, list[Tensor]] = {}
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    assert layers.keys() == {layer.name for layer in on_first.layers}
    with tuned.disable_adapter(), torch.no_grad():
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
            for name, module in layers.items()
        ]
        marks = []
        for line in (tasks[0] / "train.jsonl").read_text("utf-8").splitlines():
            messages = json.loads(line)["messages"]
            asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            said = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
            start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
            marks.append(slice(start - 1, ids.shape[1] - 1))  # the positions that predict the answer
            tuned(input_ids=ids)
        for handle in handles:
            handle.remove()
    for layer in on_first.layers:
        module = layers[layer.name]
        x = torch.cat([rows[mark] for rows, mark in zip(inputs[layer.name], marks, strict=True)])
        moved = [
            x @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T * module.scaling[name]
            for name in ("first", "second")
        ]
        own, other = (float(each.square().sum()) for each in moved)
        assert layer.other / layer.own == pytest.approx(other / own, rel=0.01)
        expected = float((moved[0] * moved[1]).sum()) / own
        assert layer.product / layer.own == pytest.approx(expected, rel=0.02, abs=0.01)
    assert command("inspect", *independent) == 0
    text = capfd.readouterr().out
    assert f"{on_first.ratio:.1%}" in text and f"{on_second.ratio:.1%}" in text


def test_the_sum_of_two_adapters_is_measured_on_both_tasks(
    tasks: tuple[Path, Path], independent: tuple[Path, Path], tiny_folder: Path, tmp_path: Path, capfd
) -> None:
    assert command("eval", *independent, "--samples", 4, "--dtype", "float32", "--output", tmp_path / "sum") == 0
    assert "with the other added" in capfd.readouterr().out
    found = evaluated(tmp_path / "sum")
    texts = found.of_kind(TextKind.EARLIER)
    assert [text.name for text in texts] == ["task of independent (1)", "task of independent (2)"]
    tuned = PeftModel.from_pretrained(plain_base(tiny_folder), independent[0] / "adapter", adapter_name="first")
    tuned.load_adapter(independent[1] / "adapter", "second")
    tuned.base_model.set_adapter(["first", "second"])
    for text, folder in zip(texts, tasks, strict=True):
        expected = task_loss(tuned, tiny_folder, folder / "heldout.jsonl")
        assert text.loss.tuned.value == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_not_added_to_one_that_holds_it(tasks: tuple[Path, Path], second_run: Path, capfd) -> None:
    assert command("eval", tasks[0] / "run", second_run) == 2
    assert "holds it already" in capfd.readouterr().err
    assert command("merge", second_run, tasks[0] / "run", "--output", tasks[0] / "both") == 2
    assert "holds it already" in capfd.readouterr().err
