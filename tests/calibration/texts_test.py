"""What the penalty is taken of: sampled and public text, weighted by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from folora_q.calibration.gate_store import load_gates
from folora_q.calibration.reading import Reading
from folora_q.calibration.texts import (
    MIN_WINDOW_TOKENS,
    PUBLIC_TEXT,
    WINDOW,
    penalty_text,
    public_windows,
    with_earlier_tasks,
)
from folora_q.core import ProjectedCovariance
from folora_q.data.tokens import IGNORED, batches
from folora_q.evaluation.loss import GENERAL_TEXTS
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe import load_recipe
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from folora_q.runs.folder import RunFolder
from folora_q.workflows.train import TrainingRequest, run_training
from tests.conftest import Silent, write_recipe

CPU = torch.device("cpu")


def sequences(seed: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (9 + 7 * i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def model(tiny_folder: Path):
    base = load_model(ModelSection(model_name_or_path=str(tiny_folder)), Hardware(CPU, torch.float32, "a test"))
    return attach_adapter(base, AdapterSection(r=4), seed=0).eval()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_the_public_share_of_the_weight_is_as_asked_and_its_mean_is_one(share: float) -> None:
    written, public = (list(batches(sequences(seed, count), 2, CPU)) for seed, count in ((1, 6), (2, 3)))
    text = penalty_text([(written, 1 - share), (public, share)])
    tokens = [int(batch.attention_mask.sum()) for batch in text]
    weights = [batch.weight * count for batch, count in zip(text, tokens, strict=True)]
    assert sum(weights) == pytest.approx(sum(tokens))
    assert sum(weights[len(written) :]) == pytest.approx(share * sum(tokens))
    assert [batch.input_ids.tolist() for batch in text] == [b.input_ids.tolist() for b in (*written, *public)]


def test_without_a_share_no_public_text_is_read() -> None:
    written, public = (list(batches(sequences(seed, 4), 2, CPU)) for seed in (1, 2))
    assert penalty_text([(written, 1.0), (public, 0.0)]) == written


@pytest.mark.parametrize("weighted", [False, True], ids=["activation", "fisher"])
def test_statistics_count_a_token_as_often_as_its_weight_says(model, weighted: bool) -> None:
    name = "model.layers.1.mlp.down_proj"
    modules = {pair.name: pair.module for pair in adapter_pairs(model)}
    written, public = (list(batches(sequences(seed, 4), 2, CPU)) for seed in (1, 2))

    def covariance(text: list) -> torch.Tensor:
        sink = ProjectedCovariance(torch.eye(modules[name].in_features), dtype=torch.float64)
        with model.disable_adapter():
            Reading(model, modules, [[name]], weighted).feed(text, {name: sink})
        return sink.mean()

    found = covariance(penalty_text([(written, 0.75), (public, 0.25)]))
    # The mean of two means: both texts have as many tokens.
    expected = 0.75 * covariance(written) + 0.25 * covariance(public)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_public_text_is_there_in_every_kind_and_is_not_what_is_measured(tiny_folder: Path) -> None:
    windows = public_windows(AutoTokenizer.from_pretrained(tiny_folder))
    assert len(windows) > 10 and all(MIN_WINDOW_TOKENS <= len(window) <= WINDOW for window in windows)
    text = PUBLIC_TEXT.read_text("utf-8")
    for kind in ("Ishmael", "hidalgo", "couché", "Ungeziefer", "SELECT", "def ", "#include", '{"id"', "| year |"):
        assert kind in text
    own = text.split()
    for path in GENERAL_TEXTS.values():
        words = path.read_text("utf-8").split()
        phrases = {" ".join(words[start : start + 6]) for start in range(len(words) - 5)}
        assert not any(" ".join(own[start : start + 6]) in phrases for start in range(len(own) - 5)), path.stem


def test_a_run_takes_the_recipes_share_of_public_text(tiny_folder: Path, tmp_path: Path) -> None:
    gates = []
    for share in (0, 0.3):
        (folder := tmp_path / str(share)).mkdir()
        changes = [f"proxy.public_share={share}", "gate.rule=frozen", "training.max_steps=1"]
        run_training(TrainingRequest(recipe=load_recipe(write_recipe(folder, tiny_folder), changes)), Silent())
        gates.append(load_gates(RunFolder(folder / "run").gates, CPU))
    alone, mixed = (found["model.layers.0.self_attn.q_proj"].quotients for found in gates)
    assert alone.shape == mixed.shape and not torch.allclose(alone, mixed, rtol=0.05)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_earlier_tasks_have_their_share_of_the_predictions_and_the_rest_is_as_it_was(share: float) -> None:
    written, public, rows = (list(batches(sequences(seed, 4), 2, CPU)) for seed in (1, 2, 3))
    ids = sequences(3, 4)
    labels = [[IGNORED] * (len(row) - 4) + row[-4:] for row in ids]  # four of each row's tokens are an answer
    rows = list(batches(ids, 2, CPU, labels))
    penalty = penalty_text([(written, 0.75), (public, 0.25)])
    found = with_earlier_tasks(penalty, rows, share)

    def weights_of(part) -> float:
        return sum(float(batch.weight) * int(batch.loss_positions.sum()) for batch in part)

    before, earlier = found[: len(penalty)], found[len(penalty) :]
    assert weights_of(earlier) / weights_of(found) == pytest.approx(share)
    ratios = {new.weight / old.weight for new, old in zip(before, penalty, strict=True)}
    assert max(ratios) == pytest.approx(min(ratios)), "sampled and public text keep their proportion"
    assert with_earlier_tasks(penalty, rows, 0) == penalty
