"""The kernels that compute a run's training steps: what `training.kernels` chooses, and what a run falls back to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from peft import PeftModel

from folora_q.kernels.compiled_layers import CompilationError, CompiledLayers
from folora_q.kernels.fused_adapters import FusedAdapters
from folora_q.recipe.training import Kernels

# Compiling takes some seconds on a CPU, and a minute or more on a GPU: a shorter run would not win that back.
MIN_SECONDS_TO_COMPILE = 600
# Compiled layers are kept if a step takes at most this share of the time that it takes without.
MAX_SHARE_OF_TIME = 0.95


class StepKernels:
    """How a model's layers are computed in training steps; evaluations never use it.

    Args:
        choice: `training.kernels`. Liger's kernels are in the model already, from the moment that it is loaded.
        shared: names of layers that read the same tensor.
        tell: receives a line about each choice.

    Attributes:
        fused: adapters with a frozen A that are computed by our function; None before `prepare`.
        compiled: compiled decoder layers; None if they are not compiled.
    """

    def __init__(
        self,
        model: PeftModel,
        choice: Kernels = "none",
        shared: Sequence[Sequence[str]] = (),
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.choice, self.shared, self.tell = model, choice, shared, tell
        self.fused: FusedAdapters | None = None
        self.compiled: CompiledLayers | None = None

    def prepare(self, compiled: bool) -> None:
        """Build the kernels that are not chosen by measurement; A must have its final value."""
        if self.choice != "none":
            self.fused = FusedAdapters(self.model, self.shared)
        if compiled or self.choice == "compile":
            self.compiled = CompiledLayers(self.model)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the kernels within this context.

        Raises:
            CompilationError: a layer could not be compiled.
        """
        with ExitStack() as stack:
            for kernels in (self.fused, self.compiled):
                if kernels is not None:
                    stack.enter_context(kernels.active())
            yield

    def stop_compiling(self, error: CompilationError) -> None:
        """Use the layers as they are from now on."""
        self.compiled = None
        self.tell(f"training.kernels: layers run without compilation: {error.message}")

    def choose_by_time(self, step: Callable[[], object], steps: int) -> None:
        """With `auto`, compile the layers if the run is long enough, and keep that if it is faster.

        Args:
            step: computes a micro-batch of the usual size, and waits for it.
            steps: the number of micro-batches in the run.
        """
        if self.choice != "auto":
            return
        before = _seconds(step)
        if before * steps < MIN_SECONDS_TO_COMPILE:
            return
        self.compiled = CompiledLayers(self.model)
        compiling = _seconds(step, 1)
        if self.compiled is None:  # it failed, and that was told
            return
        after = _seconds(step)
        gain = f"a step takes {after / before:.2f} of the time, and compiling took {compiling:.0f} s"
        if after > MAX_SHARE_OF_TIME * before:
            self.compiled = None
            self.tell(f"training.kernels: decoder layers are not compiled: {gain}")
        else:
            self.tell(f"training.kernels: decoder layers are compiled: {gain}")


def _seconds(step: Callable[[], object], times: int = 2) -> float:
    """Return the shortest time of a step."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return min(taken)
