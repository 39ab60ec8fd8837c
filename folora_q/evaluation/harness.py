"""Run EleutherAI's lm-eval tasks on the base and the tuned model. lm-eval comes with `folora-q[eval]`."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.errors import FoloraError, UserError, first_line
from folora_q.runs.results import HarnessResult

# Resamples for the standard error of a metric that is not a mean. lm-eval uses 100000, on all cores.
BOOTSTRAP = 1000


class Sides(Protocol):
    """Provides base and tuned model, each within a context; one may be the other with its adapter off."""

    def base(self) -> AbstractContextManager[PreTrainedModel]: ...

    def tuned(self) -> AbstractContextManager[PreTrainedModel]: ...


class RemoteCode(BaseException):
    """A task requires a metric that is a script on a hub. Not an Exception, which lm-eval would catch."""


@dataclass(frozen=True)
class Metric:
    """One metric of one task on one side; `each` has the values by document if the metric is their mean."""

    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool
    each: dict[int, float] | None


@dataclass(frozen=True)
class HarnessRequest:
    """What lm-eval should run.

    Attributes:
        tasks: lm-eval's names of tasks, groups or tags.
        include_path: a folder of your own task files; they take precedence over lm-eval's.
        limit: maximum number of documents of each task.
        num_fewshot: number of examples in the prompt; a task that fixes it at 0 keeps that.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 8
    seed: int = 0


def run_harness(
    sides: Sides,
    tokenizer: Tokenizer,
    request: HarnessRequest,
    on_progress: Callable[[int], None] = lambda runs: None,
) -> list[HarnessResult]:
    """Run each task on both sides; models, tokenizer and random states do not change.

    lm-eval holds logits over the full vocabulary for every position of a batch, twice: 8 rows of 1024 tokens and a
    vocabulary of 128k in bfloat16 are 4 GiB. Tasks that score complete documents fill the model's context.
    Code of a task in `include_path` is run; code from a hub never is.

    Args:
        on_progress: called with 1 after each task on each side, twice as often as there are tasks.

    Returns:
        One result for each task and metric that both sides have; of groups too, where they have metrics.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or cannot be run.
    """
    if request.include_path is not None and not request.include_path.is_dir():
        raise UserError(f"there is no folder {request.include_path} with lm-eval tasks")
    names = list(dict.fromkeys(request.tasks))
    with _quiet():
        manager = _task_manager(names, request.include_path)
    settings = {
        "task_manager": manager,
        "limit": request.limit,
        "num_fewshot": request.num_fewshot,
        "apply_chat_template": request.apply_chat_template,
        "bootstrap_iters": BOOTSTRAP,
        "log_samples": True,
        "confirm_run_unsafe_code": False,
        **{f"{kind}_seed": request.seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")},
    }
    found: list[dict[tuple[str, str], Metric]] = []
    for side in (sides.base, sides.tuned):
        metrics: dict[tuple[str, str], Metric] = {}
        with side() as model, _unchanged(model):
            for name in names:
                with _quiet():
                    metrics |= _metrics(_evaluate(name, model, tokenizer, request.batch_size, settings))
                on_progress(1)
        found.append(metrics)
    base, tuned = found
    return [_result(*key, base[key], tuned[key]) for key in base if key in tuned]


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Find the tasks, and return lm-eval's manager for them.

    Raises:
        UserError: a name is unknown.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):  # lm-eval's own 14000 files need not be read
            return manager
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists all names"
            raise UserError(f"lm-eval has no task {name!r}", hint)
    return manager


def _evaluate(
    name: str, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run one task on one model, and return the result of lm-eval's `simple_evaluate`.

    Raises:
        UserError: the task cannot be run, e.g. without its data, with unsafe code, or with this model.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        make = cast(Any, HFLM)  # its decorator hides its parameters
        lm = make(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        return cast("dict[str, Any]", simple_evaluate(model=lm, tasks=[name], **settings))
    except RemoteCode as refused:
        raise UserError(f"lm-eval's task {name} cannot be run: {refused}") from None
    except (FoloraError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = "its data is on a hub: connect once, and it is cached" if isinstance(error, ConnectionError) else None
        raise UserError(f"lm-eval's task {name} cannot be run: {first_line(error)}", hint) from error


def _metrics(found: dict[str, Any]) -> dict[tuple[str, str], Metric]:
    """Return metrics by task and name. lm-eval has "acc,none", "acc_stderr,none" and entries that are not metrics."""
    metrics: dict[tuple[str, str], Metric] = {}
    for task, entries in found["results"].items():
        samples = found["samples"].get(task, [])  # a group has none
        directions = found["higher_is_better"].get(task, {})
        for key, value in entries.items():
            metric, comma, kind = key.rpartition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = entries.get(f"{metric}_stderr,{kind}")
            rows = {row["doc_id"]: row[metric] for row in samples if row["filter"] == kind and metric in row}
            metrics[task, metric if kind == "none" else f"{metric} ({kind})"] = Metric(
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, Real) else None,
                samples=len(rows) or int(entries.get("sample_len", 0)),
                higher_is_better=directions.get(metric) is not False,  # None: unknown
                each=_if_mean(rows, float(value)),
            )
    return metrics


def _if_mean(rows: dict[int, Any], value: float) -> dict[int, float] | None:
    """Return the values by document if the metric is their mean, unlike perplexity and F1."""
    if not rows or not all(isinstance(each, Real) for each in rows.values()):
        return None
    values = {document: float(each) for document, each in rows.items()}
    mean = sum(values.values()) / len(values)
    return values if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9) else None


def _result(task: str, metric: str, base: Metric, tuned: Metric) -> HarnessResult:
    paired = None
    if base.each and tuned.each and base.each.keys() == tuned.each.keys() and len(base.each) > 1:
        differences = np.array([tuned.each[document] - value for document, value in base.each.items()])
        paired = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    return HarnessResult(
        task=task,
        metric=metric,
        samples=base.samples,
        base=base.value,
        base_stderr=base.stderr,
        tuned=tuned.value,
        tuned_stderr=tuned.stderr,
        change_stderr=paired,
        higher_is_better=base.higher_is_better,
    )


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo lm-eval's switch to evaluation mode, and prevent it from tying weights, e.g. those of an untied head."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with patch.object(model, "tie_weights", _nothing):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval silent, without code from a hub, and restore environment and random states.

    Raises:
        UserError: it is not installed.
    """
    environment, disabled = dict(os.environ), logging.root.manager.disable
    python_state, numpy_state = random.getstate(), np.random.get_state()
    logging.disable(logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstrap in this process: a fork would take CUDA along
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for owner, name, value in _substitutes():
                stack.enter_context(patch.object(owner, name, value))
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        logging.disable(disabled)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _substitutes() -> list[tuple[Any, str, Any]]:
    """Return what is replaced while lm-eval runs: object, attribute and value."""
    try:
        import evaluate
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        from tqdm.std import tqdm
    except ImportError:
        raise UserError("lm-eval is not installed", "pip install 'folora-q[eval]'") from None
    start = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    return [
        (tqdm, "__init__", hidden),
        (evaluate, "load", _refuse),
        (lm_eval.evaluator, "add_env_info", _nothing),  # starts pip and nvidia-smi
        (lm_eval.evaluator, "get_git_commit_hash", _nothing),  # git complains outside of a repository
    ]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _refuse(path: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RemoteCode(f"its metric {path} is a script on a hub, and code from a hub is not run")
