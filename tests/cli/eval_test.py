"""Any adapter, ours or somebody else's, and any merged model, from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.cli.app import main
from folora_q.runs.result_files import read_answers, read_evaluation
from folora_q.runs.results import Evaluation, TextKind


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def evaluated(folder: Path) -> Evaluation:
    return read_evaluation(folder / "evaluation.json")


@pytest.fixture
def foreign(tiny_folder: Path, tmp_path: Path) -> Path:
    """An adapter that plain PEFT trained on 16-bit weights, and nothing else knows of."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_folder)("it is what it is, that is")["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path / "foreign"
    tuned.save_pretrained(folder)
    return folder


QUICK = ("evaluation.max_new_tokens=4", "training.max_steps=3")


def test_a_run_is_measured_again_as_it_measured_itself(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, *QUICK) == 0
    folder = tmp_path / "run"
    assert run("eval", folder, "--output", tmp_path / "again") == 0
    first, second = evaluated(folder), evaluated(tmp_path / "again")
    assert second.texts == first.texts
    assert second.score == first.score
    for before, after in zip(first.layers, second.layers, strict=True):
        assert after.name == before.name and after.energy_kept == before.energy_kept
        assert after.drift == pytest.approx(before.drift, rel=1e-6)
        assert after.predicted == pytest.approx(before.predicted, rel=1e-6)
    assert read_answers(folder / "answers.jsonl") == read_answers(tmp_path / "again" / "answers.jsonl")
    text = capfd.readouterr().out
    assert f"{folder}against" in "".join(text.split()) and "generated text, cut: KL" in text
    assert run("eval", folder, "--output", tmp_path / "again") == 2
    assert "already exists" in capfd.readouterr().err


def test_an_adapter_from_elsewhere_is_measured_on_text_that_its_base_writes(
    foreign: Path, tmp_path: Path, capfd
) -> None:
    (tmp_path / "notes.txt").write_text("that is what it is, and so it goes on and on and on. " * 4)
    given = ("--samples", 6, "--dtype", "float32", "--text", tmp_path / "notes.txt")
    assert run("eval", foreign, *given, "--output", tmp_path / "found") == 0
    found = evaluated(tmp_path / "found")
    assert [text.name for text in found.texts] == ["generated text", "generated text, cut", "notes"]
    assert found.texts[0].texts == 6 and found.texts[0].kl.value > 0
    assert found.text("notes").loss.change.value < 0, "it was trained on such words"
    assert found.score is None
    assert len(found.layers) == 4 and all(
        layer.drift[TextKind.GENERATED] > 0 and layer.update_norm > 0 for layer in found.layers
    )
    text, talk = capfd.readouterr()
    assert "only forgetting is measured" in talk and "[done] sampling text" in talk
    assert "What is the capital of Australia" in text
    assert run("eval", foreign, *given) == 0
    assert "sampled text read from" in capfd.readouterr().err


def test_a_recipe_says_what_the_task_of_an_adapter_is(foreign: Path, recipe_file: Path, tmp_path: Path) -> None:
    given = ("--samples", 4, "--dtype", "float32", "--recipe", recipe_file)
    assert run("eval", foreign, *given, "--output", tmp_path / "found") == 0
    found = evaluated(tmp_path / "found")
    assert (found.text("task").texts, found.score.answers, found.score.metric) == (4, 4, "exact_match")


def test_a_merged_model_is_measured_against_what_it_was_made_of(
    foreign: Path, tiny_folder: Path, tmp_path: Path, capfd
) -> None:
    merged = tmp_path / "foreign-merged"
    assert run("merge", foreign, "--base", "original", "--dtype", "float32") == 0
    given = ("--samples", 4, "--dtype", "float32")
    assert run("eval", merged, *given, "--output", tmp_path / "merged") == 0
    assert run("eval", foreign, *given, "--bits", 16, "--output", tmp_path / "adapter") == 0
    of_merged, of_adapter = evaluated(tmp_path / "merged"), evaluated(tmp_path / "adapter")
    for one, other in zip(of_merged.texts, of_adapter.texts, strict=True):
        assert one.kl.value == pytest.approx(other.kl.value, rel=1e-3)
        assert one.loss.base.value == pytest.approx(other.loss.base.value, rel=1e-5)
    moved = {
        layer.name: layer.drift[TextKind.GENERATED]
        for layer in of_merged.layers
        if layer.drift[TextKind.GENERATED] > 1e-9
    }
    assert moved == pytest.approx(
        {layer.name: layer.drift[TextKind.GENERATED] for layer in of_adapter.layers}, rel=1e-2
    )

    capfd.readouterr()
    assert run("eval", tiny_folder) == 2
    error = capfd.readouterr().err
    assert "there is nothing to compare it with" in error and "--against" in error
    assert run("eval", tiny_folder, "--against", tiny_folder, *given, "--output", tmp_path / "same") == 0
    same = evaluated(tmp_path / "same")
    assert all(text.kl.value == 0 and text.loss.change.value == 0 for text in same.texts)


def test_when_the_rows_are_gone_the_rest_is_measured(recipe_file: Path, tmp_path: Path, capfd) -> None:
    assert run("train", recipe_file, *QUICK, "evaluation.metric=none") == 0
    (tmp_path / "train.jsonl").unlink()
    assert run("eval", tmp_path / "run", "--output", tmp_path / "found") == 0
    assert "the task is not measured: " in capfd.readouterr().err
    assert [text.kind for text in evaluated(tmp_path / "found").texts] == [
        TextKind.GENERATED,
        TextKind.GENERATED,
        "general",
    ]


def test_lm_eval_runs_a_task_from_a_file_on_both(foreign: Path, tmp_path: Path, capfd) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"is it {i}?", "choices": ["it is", "no"], "answer": i % 2} for i in range(6)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "is_it.yaml").write_text(
        "task: is_it\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tasks / 'rows.jsonl'}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    given = ("--samples", 4, "--tasks", "is_it", "--tasks-folder", tasks, "--output", tmp_path / "found")
    assert run("eval", foreign, *given) == 0
    [result] = evaluated(tmp_path / "found").harness
    assert (result.task, result.metric, result.samples) == ("is_it", "acc", 6)
    assert 0 <= result.base <= 1 and 0 <= result.tuned <= 1 and math.isfinite(result.change_stderr)
    assert "is_it" in capfd.readouterr().out
    assert run("eval", foreign, "--samples", 4, "--tasks", "is_itt", "--tasks-folder", tasks) == 2
    assert "is_it" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at/all"], "there is no run, adapter or model at"),
        (["{foreign}", "--text", "gone.txt"], "gone.txt"),
        (["{foreign}", "--recipe", "gone.yaml"], "gone.yaml"),
        (["{foreign}", "--against", "gone/model"], "gone/model"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(foreign: Path, capfd, arguments: list[str], said: str) -> None:
    assert run("eval", *(argument.format(foreign=foreign) for argument in arguments)) == 2
    assert said in capfd.readouterr().err
