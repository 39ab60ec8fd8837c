from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from folora_q.errors import UserError
from folora_q.evaluation.harness import HarnessRequest, run_harness
from folora_q.runs.results import HarnessResult
from tests.conftest import save_tiny_model

WORDS = "the sea is in this thin box and no one sings that old thing to me".split()
QUESTIONS = [
    {
        "question": f"{WORDS[i]} {WORDS[-i]} then",
        "choices": [WORDS[(i + 3 * j) % 15] + "!" * j for j in range(3)],
        "gold": i % 3,
    }
    for i in range(len(WORDS))
]


class Pair:
    """Two models, or one with an adapter."""

    def __init__(self, base, tuned=None) -> None:
        self.first, self.second = base, tuned

    @contextmanager
    def base(self) -> Iterator:
        if self.second is None:
            with self.first.disable_adapter():
                yield self.first.get_base_model()
        else:
            yield self.first

    @contextmanager
    def tuned(self) -> Iterator:
        yield self.first.get_base_model() if self.second is None else self.second


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory) -> Pair:
    other = save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    return Pair(load(tiny_folder), load(other))


def generated(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        log_p = log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return float(sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair: Pair, tokenizer) -> Path:
    """Tasks: choosing, predicting and answering. A third of the answers is the base's own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {**row, "answer": generated(pair.second if i % 3 else pair.first, tokenizer, row["question"])}
        for i, row in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(name: str, **task) -> None:
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "rows.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "question",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}), encoding="utf-8")

    choosing = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    accuracies = [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]
    exact = [{"metric": "exact_match", **mean}]
    write("choosing", **choosing, metric_list=accuracies)
    write("choosing_again", **choosing, metric_list=accuracies)
    write("predicting", output_type="loglikelihood", doc_to_target=" {{choices[0]}}")
    write(
        "answering",
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"max_gen_toks": 4, "do_sample": False, "until": []},
        metric_list=exact,
        filter_list=[
            {"name": "none", "filter": [{"function": "take_first"}]},
            {"name": "shout", "filter": [{"function": "uppercase"}, {"function": "take_first"}]},
        ],
    )
    write("unsafe", **choosing, unsafe_code=True)
    write("foreign", **choosing, metric_list=[{"metric": "poetry", **mean}])
    write("absent", **choosing, dataset_path="nobody/nothing", dataset_kwargs={})
    group = {"group": "both", "task": ["choosing", "choosing_again"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


@pytest.fixture
def own_tasks_alone(monkeypatch) -> None:
    """lm-eval's own thousands of tasks take seconds to read."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))


def chosen(model, tokenizer, normalized: bool) -> np.ndarray:
    right = []
    for row in QUESTIONS:
        scores = np.array([log_likelihood(model, tokenizer, row["question"], f" {word}") for word in row["choices"]])
        if normalized:
            scores = scores / [len(word) for word in row["choices"]]
        right.append(float(scores.argmax() == row["gold"]))
    return np.array(right)


def check(result: HarnessResult, base: np.ndarray, tuned: np.ndarray) -> None:
    root = np.sqrt(len(base))
    assert result.samples == len(base) == len(QUESTIONS)
    assert (result.base, result.tuned) == pytest.approx((base.mean(), tuned.mean()))
    assert result.base_stderr == pytest.approx(base.std(ddof=1) / root)
    assert result.tuned_stderr == pytest.approx(tuned.std(ddof=1) / root)
    assert result.change_stderr == pytest.approx((tuned - base).std(ddof=1) / root)
    assert result.higher_is_better


def test_the_values_are_those_of_the_models_and_their_changes_are_paired(
    pair: Pair, tokenizer, folder: Path, tmp_path: Path, monkeypatch, capfd, caplog
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository: lm-eval asks git
    monkeypatch.delenv("HF_XET_HIGH_PERFORMANCE", raising=False)
    environment = dict(os.environ)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    progress: list[int] = []
    results = run_harness(
        pair,
        tokenizer,
        HarnessRequest(["choosing", "predicting", "answering"], include_path=folder, batch_size=5),
        progress.append,
    )
    assert os.environ == environment
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]
    assert (tuple(capfd.readouterr()), caplog.records) == (("", ""), [])
    assert progress == [1] * 6

    found = {(result.task, result.metric): result for result in results}
    assert set(found) == {
        ("choosing", "acc"),
        ("choosing", "acc_norm"),
        ("predicting", "acc"),
        ("predicting", "perplexity"),
        ("answering", "exact_match"),
        ("answering", "exact_match (shout)"),
    }
    for metric in ("acc", "acc_norm"):
        right = [chosen(model, tokenizer, metric == "acc_norm") for model in (pair.first, pair.second)]
        check(found["choosing", metric], *right)
        assert right[0].any() and (right[0] != right[1]).any()

    answers = [json.loads(line)["answer"] for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    for metric, change in (("exact_match", str), ("exact_match (shout)", str.upper)):
        right = [
            np.array(
                [
                    float(change(generated(model, tokenizer, row["question"])) == answer)
                    for row, answer in zip(QUESTIONS, answers, strict=True)
                ]
            )
            for model in (pair.first, pair.second)
        ]
        check(found["answering", metric], *right)
    assert 0 < found["answering", "exact_match"].base < found["answering", "exact_match"].tuned < 1

    perplexity = found["predicting", "perplexity"]
    for model, value in ((pair.first, perplexity.base), (pair.second, perplexity.tuned)):
        mean = np.mean(
            [log_likelihood(model, tokenizer, row["question"], f" {row['choices'][0]}") for row in QUESTIONS]
        )
        assert value == pytest.approx(np.exp(-mean), rel=1e-4)
    assert not perplexity.higher_is_better
    assert perplexity.base_stderr > 0 and perplexity.change_stderr is None


def test_an_adapter_is_compared_with_itself_switched_off_and_left_as_it_was(
    tiny_folder: Path, tokenizer, folder: Path
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(tiny_folder), LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    inner = model.get_base_model()
    with model.disable_adapter():
        base = chosen(inner, tokenizer, False)
    tuned = chosen(inner, tokenizer, False)
    assert (base != tuned).any()

    model.train()
    inner.lm_head.eval()
    inner.config.tie_word_embeddings = True  # as of a base whose tied head was parted
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    settings = inner.config.to_dict(), inner.generation_config.to_dict(), sorted(vars(inner))
    ours = repr(tokenizer)
    (result, _) = run_harness(Pair(model), tokenizer, HarnessRequest(["choosing"], include_path=folder))

    check(result, base, tuned)
    assert repr(tokenizer) == ours and tokenizer.pad_token is None
    assert settings == (inner.config.to_dict(), inner.generation_config.to_dict(), sorted(vars(inner)))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


def test_a_model_does_not_differ_from_itself(pair: Pair, tokenizer, folder: Path) -> None:
    same = Pair(pair.first, pair.first)
    for result in run_harness(same, tokenizer, HarnessRequest(["choosing", "answering"], include_path=folder, limit=7)):
        assert result.samples == 7
        assert result.base == result.tuned
        assert result.change_stderr == 0


def test_prompts_can_go_through_the_chat_template_with_examples(pair: Pair, tokenizer, folder: Path) -> None:
    plain, chat, shots = (
        run_harness(pair, tokenizer, HarnessRequest(["predicting"], include_path=folder, limit=6, **settings))
        for settings in ({}, {"apply_chat_template": True}, {"num_fewshot": 2})
    )
    perplexities = {next(r.base for r in results if r.metric == "perplexity") for results in (plain, chat, shots)}
    assert len(perplexities) == 3


def test_a_group_has_no_pairs_of_its_own(pair: Pair, tokenizer, folder: Path, own_tasks_alone) -> None:
    found = {
        (result.task, result.metric): result
        for result in run_harness(pair, tokenizer, HarnessRequest(["both"], include_path=folder))
    }
    group = found["both", "acc"]
    assert group.samples == 2 * len(QUESTIONS)
    assert group.base == pytest.approx(found["choosing", "acc"].base)
    assert group.base_stderr > 0 and group.change_stderr is None
    assert found["choosing_again", "acc"].change_stderr > 0


def test_an_unknown_task_is_named_with_what_is_like_it(pair: Pair, tokenizer, folder: Path, own_tasks_alone) -> None:
    with pytest.raises(UserError, match="no task 'chosing'") as caught:
        run_harness(pair, tokenizer, HarnessRequest(["choosing", "chosing"], include_path=folder))
    assert caught.value.hint.startswith("did you mean choosing")
    with pytest.raises(UserError, match="no folder"):
        run_harness(pair, tokenizer, HarnessRequest(["choosing"], include_path=folder / "none"))


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("unsafe", "Attempted to run task: unsafe"),
        ("foreign", "its metric poetry is a script on a hub"),
        ("absent", "nobody/nothing"),
    ],
)
def test_what_lm_eval_cannot_run_is_the_users_to_mend(
    pair: Pair, tokenizer, folder: Path, task: str, reason: str, capfd
) -> None:
    with pytest.raises(UserError, match=f"task {task} cannot be run: .*{reason}") as caught:
        run_harness(pair, tokenizer, HarnessRequest([task], include_path=folder))
    assert "\n" not in caught.value.message
    assert (caught.value.hint is not None) == (task == "absent")
    assert tuple(capfd.readouterr()) == ("", "")


def test_without_lm_eval_it_says_how_to_get_it(pair: Pair, tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm-eval is not installed") as caught:
        run_harness(pair, tokenizer, HarnessRequest(["choosing"]))
    assert caught.value.hint == "pip install 'folora-q[eval]'"
