"""Run many inputs on one target, count the outcomes, and keep one finding of each kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.contract import LARGE, Bench, Verdict
from tests.fuzz.hostile import hostile
from tests.fuzz.mutations import inputs

# Hypothesis remembers what it has tried, so a fresh run starts after this many examples.
BATCH = 500


@dataclass(frozen=True)
class Finding:
    """An input that gave neither a value nor a clear error."""

    file: str
    content: bytes
    verdict: Verdict


@dataclass
class Tally:
    """The outcomes of a target's inputs.

    Attributes:
        count: the number of inputs that gave a finding.
        slowest: the largest processor time of one input, in seconds.
        most: the largest growth in memory of one input, in bytes.
        findings: by kind, the one with the shortest input.
        messages: one refusal for each way that a message begins, for people to read.
    """

    target: str
    accepted: int = 0
    refused: int = 0
    count: int = 0
    slowest: float = 0.0
    most: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + self.count

    def add(self, file: str, content: bytes, verdict: Verdict) -> None:
        self.slowest, self.most = max(self.slowest, verdict.seconds), max(self.most, verdict.grown)
        match verdict.kind:
            case "accepted":
                self.accepted += 1
            case "refused":
                self.refused += 1
                self.messages.setdefault(_words_of(verdict.told), verdict.told)
            case "finding":
                self.count += 1
                known = self.findings.get(verdict.alike)
                if known is None or len(content) < len(known.content):
                    self.findings[verdict.alike] = Finding(file, content, verdict)


def hostile_inputs(bench: Bench, most: int = 2**40, at_most: int = 2**40) -> Iterator[tuple[str, bytes]]:
    """Yield the inputs of the fixed list, as file and content.

    Args:
        most: leave out contents with more bytes than this.
        at_most: yield at most this many inputs, spread evenly over the list.
    """
    if bench.target.large:
        most = min(most, LARGE)
    listed = [
        (file, content)
        for file, kind in bench.target.files.items()
        for content in hostile(kind, bench.seeds[file]).values()
    ]
    for file, content in listed[:: max(-(-len(listed) // at_most), 1)]:
        made = content() if callable(content) else content
        if len(made) <= most:
            yield file, made


def run_hostile(bench: Bench, tally: Tally) -> None:
    """Judge every input of the fixed list."""
    for file, content in hostile_inputs(bench):
        tally.add(file, content, bench.judge(file, content))


def run_random(bench: Bench, tally: Tally, examples: int, start: int = 0, until: float = float("inf")) -> None:
    """Judge inputs that hypothesis generates.

    Args:
        examples: the maximum number of inputs.
        start: the seed; the same seed gives the same inputs.
        until: the time, by `time.monotonic`, after which no batch is started.
    """
    made = st.sampled_from(list(bench.target.files)).flatmap(
        lambda file: st.tuples(st.just(file), inputs(bench.target.files[file], bench.seeds[file]))
    )
    done = 0
    while done < examples and time.monotonic() < until:
        size = min(BATCH, examples - done)

        @seed(start + done)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(made)
        def batch(example: tuple[str, bytes]) -> None:
            tally.add(*example, bench.judge(*example))

        batch()
        done += size


def _words_of(message: str) -> str:
    """Return the beginning of a message, without the parts that change from input to input."""
    return "".join("0" if letter.isdigit() else letter for letter in message[:400]).partition("'")[0][:90]
