"""The processes of a run: who does what, and how they share results. Built on accelerate's PartialState.

The first process owns the run folder, the terminal and the answers. The others read the same data, take their share
of texts and rows, and follow its decisions. Every method is called by all processes, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from folora_q.errors import OtherProcessError

T = TypeVar("T")
# Others wait while the first process samples, evaluates or saves: longer than torch's half hour.
PATIENCE = timedelta(days=2)
ENDED = "another process of this run has ended: its own message says why, or it was killed"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: the number of this process.
        count: the number of processes.
        device: where this process computes, and sends from.
        sharded: they share one base (`folora_q.models.sharding`), so each forward pass is one of all processes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process owns the run folder and the terminal."""
        return self.rank == 0

    @property
    def independent(self) -> bool:
        """Whether each may divide its batches as its own memory requires: with a sharded base all must do the same."""
        return not self.sharded

    @property
    def readers(self) -> Processes:
        """The processes that divide reading and generating text among them.

        With a sharded base each reads everything, at the same time as the others, and needs no other's results.
        """
        return Processes(device=self.device, sharded=True) if self.sharded else self

    def owns(self, number: int) -> bool:
        """Whether this process computes the part of work with this number."""
        return number % self.count == self.rank

    def share(self, compute: Callable[[], T]) -> T:
        """Compute in the first process, and return its result in all. The result must be picklable.

        Raises:
            OtherProcessError: it failed in the first process, which raises the error itself.
        """
        if self.count == 1:
            return compute()
        sent: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.first:
            try:
                sent = [True, compute()]
            except BaseException as error:
                failure, sent = error, [False, None]
        with _connected():
            dist.broadcast_object_list(sent, src=0, device=self.device)
        if failure is not None:
            raise failure
        if not sent[0]:
            raise OtherProcessError(ENDED)
        return sent[1]

    def after_the_first(self, compute: Callable[[], T]) -> T:
        """Compute in the first process, and then in the others, which find what it has left in caches.

        Raises:
            OtherProcessError: it failed in the first process, which raises the error itself.
        """
        mine: list[T] = []
        self.share(lambda: mine.append(compute()))
        return mine[0] if mine else compute()

    def gather(self, mine: T) -> list[T]:
        """Return the objects of all processes, in the order of their ranks."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        with _connected():
            dist.all_gather_object(found, mine)
        return found

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            with _connected():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def sums(self, numbers: Tensor) -> Tensor:
        """Return the sums over the processes of a few numbers, on this process's device."""
        if self.count > 1:
            numbers = numbers.clone()
            self.add([numbers])
        return numbers

    def generate(self, model: Any, **inputs: Any) -> Tensor:
        """Generate tokens, with the arguments of transformers' `generate`.

        Processes that share a base generate the same tokens together: those of the first, if rounding differs.
        """
        tokens = model.generate(**inputs, synced_gpus=self.sharded)
        if not self.sharded:
            return tokens
        sent = [tokens.cpu()]
        with _connected():
            dist.broadcast_object_list(sent, src=0, device=self.device)
        return sent[0].to(tokens.device)

    def in_turn(self, compute: Callable[[], T]) -> T:
        """Compute in one process after the other, for what needs much memory meanwhile."""
        results: list[T] = []
        for rank in range(self.count):
            if rank == self.rank:
                results.append(compute())
            self.gather(None)
        return results[0]

    def end(self) -> None:
        """Leave the others; nothing is shared afterwards."""
        if self.count > 1:
            dist.destroy_process_group()

    def least(self, number: int) -> int:
        """Return the smallest number of any process."""
        return min(self.gather(number))


ONE = Processes()


@contextmanager
def _connected() -> Iterator[None]:
    """Turn errors about the connection into one about the other process."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(ENDED) from error


def lost_another(error: BaseException) -> bool:
    """Return whether an error, such as one of the backward pass, means that another process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def start_processes(count: int) -> Processes:
    """Let the processes that a launcher started find each other; each takes the GPU of its local rank.

    Args:
        count: the number of processes that the launcher started.
    """
    on_gpu = torch.cuda.is_available()
    if count == 1:
        return Processes(device=torch.device("cuda" if on_gpu else "cpu"))
    from accelerate import PartialState

    state = PartialState(cpu=not on_gpu, timeout=PATIENCE)
    assert state.device is not None  # set with the process group
    return Processes(state.process_index, state.num_processes, state.device)
