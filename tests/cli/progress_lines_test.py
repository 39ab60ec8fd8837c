"""What a run shows while it trains: live on a terminal, at any width, and as plain lines without one."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from folora_q.cli import console as console_module
from folora_q.cli.app import main
from folora_q.cli.console import ConsoleProgress
from folora_q.cli.stage_line import StageLine, StagePace
from folora_q.cli.training_lines import TrainingLine, measurement_lines, plan_line, status_line
from folora_q.cli.wording import amount, clock, counted, duration, learning_rate, parameters, progress_of
from folora_q.progress import Measurement, Memory, TrainingPlan, TrainingStatus
from tests.forked import in_a_terminal

PLAN = TrainingPlan(
    sequences=38, tokens=4_210, kind="row", epochs=1.0, batch=8, steps=5, trained=2_460_000, parameters=134_500_000
)
STATUS = TrainingStatus(
    step=120,
    steps=300,
    loss=1.6123,
    learning_rate=1.9e-3,
    grad_norm=0.8123,
    tokens_per_second=2310.4,
    memory=Memory(8_100_000_000, 12_600_000_000),
    elapsed=34,
    remaining=101,
)
START = "step 120/300  loss 1.61  held-out 2.05"
MEASURED = Measurement(100, 2.0512, -0.3121, 0.1402, {"prose": 0.0031, "code": -0.0012})


@pytest.fixture(autouse=True)
def options_of_this_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves --quiet or --plain behind, and each has a terminal that can draw a line again."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console_module.err, "is_interactive", True)  # as it is where this process has a terminal
    yield
    console_module.set_output(quiet=False, plain=False)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)


def drawn(line: TrainingLine | StageLine, width: int) -> str:
    """What a line draws on a terminal of a width: one line, whatever it holds."""
    screen = terminal(width)
    screen.print(line, end="")
    text = screen.file.getvalue()
    assert text.count("\n") <= 1 and all(len(row) <= width for row in text.splitlines()), text
    return text.rstrip()


def training_line(*events: TrainingStatus | Measurement) -> TrainingLine:
    line = TrainingLine(300, now=lambda: 0.0)
    for event in events:
        line.update(event)
    return line


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (120, f"{START}  KL 0.14  lr 1.9e-3  |g| 0.81  2,310 tok/s  8.1/12.6 GB  0:34 < 1:41"),
        (100, f"{START}  KL 0.14  lr 1.9e-3  2,310 tok/s  8.1/12.6 GB  0:34 < 1:41"),
        (90, f"{START}  KL 0.14  2,310 tok/s  8.1/12.6 GB  0:34 < 1:41"),
        (80, f"{START}  KL 0.14  2,310 tok/s  0:34 < 1:41"),
        (60, f"{START}  KL 0.14  0:34 < 1:41"),
        (55, f"{START}  0:34 < 1:41"),
        (40, "step 120/300  loss 1.61  0:34 < 1:41"),
        (25, "step 120/300  loss 1.61"),
        (8, "step 120"),
    ],
)
def test_the_live_line_leaves_out_what_does_not_fit(width: int, expected: str) -> None:
    assert drawn(training_line(MEASURED, STATUS), width) == expected


def test_the_live_line_shows_only_what_was_measured() -> None:
    assert drawn(training_line(), 100) == "step 0/300  0:00"
    assert drawn(training_line(TrainingStatus(1, 300, loss=2.5, elapsed=3)), 100) == "step 1/300  loss 2.5  0:03"
    without_kl = training_line(Measurement(0, 2.0512), TrainingStatus(1, 300, loss=2.5))
    assert drawn(without_kl, 100) == "step 1/300  loss 2.5  held-out 2.05  0:00"


def test_the_clock_of_the_live_line_goes_on_between_two_steps() -> None:
    now = [10.0]
    line = TrainingLine(300, now=lambda: now[0])
    line.update(STATUS)
    now[0] += 30
    assert drawn(line, 40).endswith("1:04 < 1:11")
    now[0] += 300
    assert drawn(line, 40).endswith("6:04 < 0:00")


def test_a_plan_says_rows_steps_and_parameters() -> None:
    text = "38 rows (4,210 tokens) x 1 epoch / batch of 8 = 5 steps; 2.46 of 134 million parameters trained"
    assert plan_line(PLAN) == text


def test_numbers_have_their_plural_and_their_unit() -> None:
    assert [counted(n, "epoch") for n in (1, 1.0, 2, 1.5, 1 / 3)] == [
        "1 epoch",
        "1 epoch",
        "2 epochs",
        "1.5 epochs",
        "0.33 epochs",
    ]
    assert counted(1_100, "row") == "1,100 rows"
    assert [amount(1, "texts"), amount(288, "texts"), amount(13_500_000_000, "bytes"), amount(3, "units")] == [
        "1 text",
        "288 texts",
        "13.5 GB",
        "3",
    ]
    assert progress_of(1_200_000, 3_400_000, "bytes") == "1.2/3.4 MB"
    assert progress_of(32, 1288, "answers") == "32/1,288 answers"
    assert [clock(34.4), clock(185), clock(3723)] == ["0:34", "3:05", "1:02:03"]
    assert [duration(12.3), duration(59.7), duration(185)] == ["12s", "1:00", "3:05"]
    assert [learning_rate(rate) for rate in (1.9e-3, 2e-4, 0.3, 0.0)] == ["1.9e-3", "2.0e-4", "3.0e-1", "0"]
    assert parameters(8_192, 115_648) == "8,192 of 115,648 parameters trained"
    assert parameters(250_000, 134_500_000) == "0.25 of 134 million parameters trained"
    assert parameters(40_000_000, 7_240_000_000) == "40 million of 7.24 billion parameters trained"


def test_a_line_of_metrics_for_a_log() -> None:
    assert status_line(STATUS, 1.61234) == (
        "step 120/300  loss 1.6123  lr 1.9e-3  grad norm 0.812  2310 tok/s  memory 8.1/12.6 GB  elapsed 0:34  left 1:41"
    )
    assert status_line(TrainingStatus(1, 300), float("nan")) == "step 1/300  loss nan  elapsed 0:00"


def test_a_measurement_continues_below_itself_on_a_narrow_terminal() -> None:
    line = "step 100  held-out loss 2.0512 (-0.3121)  KL 0.1402  real text: prose +0.0031  code -0.0012"
    assert measurement_lines(MEASURED, 100) == [line]
    assert measurement_lines(MEASURED, 40) == [
        "step 100  held-out loss 2.0512 (-0.3121)",
        "          KL 0.1402",
        "          real text: prose +0.0031",
        "          code -0.0012",
    ]
    assert measurement_lines(Measurement(0, 2.5), 40) == ["step 0  held-out loss 2.5000"]


def test_a_log_gets_a_line_per_logged_step_and_measurement_and_one_estimate() -> None:
    log = io.StringIO()
    progress = ConsoleProgress(Console(file=log, width=20))
    progress.show(PLAN)
    with progress.stage("training", 300, "steps") as advance:
        for step in range(1, 7):
            advance(1)
            status = TrainingStatus(step, 300, loss=2.0, elapsed=2 * step, remaining=500.0 if step > 1 else None)
            progress.show(status)
            if step in (1, 6):
                progress.show(TrainingStatus(**{**vars(status), "logged_loss": 2.25}))
        progress.show(MEASURED)
    lines = log.getvalue().splitlines()
    assert lines == [
        f"  {plan_line(PLAN)}",
        "[start] training (300 steps)",
        "  step 1/300  loss 2.2500  elapsed 0:02",
        "  about 8:20 left in training",
        "  step 6/300  loss 2.2500  elapsed 0:12  left 8:20",
        "  step 100  held-out loss 2.0512 (-0.3121)  KL 0.1402  real text: prose +0.0031  code -0.0012",
        "[done] training, 0s",
    ]


def test_a_terminal_keeps_plan_and_measurements_and_draws_the_rest_once() -> None:
    screen = terminal(100)
    progress = ConsoleProgress(screen)
    progress.show(PLAN)
    with progress.stage("training", 300, "steps") as advance:
        advance(1)
        progress.show(MEASURED)
        progress.show(STATUS)
    text = screen.file.getvalue()
    assert "38 rows (4,210 tokens) × 1 epoch / batch of 8 = 5 steps" in text
    assert text.count("held-out loss 2.0512 (-0.3121)") == 1
    assert "loss 1.61  held-out 2.05  KL 0.14" in text and "2,310 tok/s" in text
    assert "grad norm" not in text and "[start]" not in text
    assert text.rstrip().endswith("✓ training 0s")


def test_a_stage_shows_as_much_as_fits() -> None:
    pace = StagePace(2_000)
    pace.advance(500)
    pace.first = pace.began, 0
    pace.last = pace.began + 10
    line = StageLine("statistics of both texts", pace, "tokens")
    assert re.fullmatch(r". statistics of both texts ━+.* 500/2,000 tokens  0:00 < 0:\d\d", drawn(line, 100))
    assert re.fullmatch(r". statistics of both texts  500/2,000 tokens  0:00 < 0:\d\d", drawn(line, 62))
    assert re.fullmatch(r". statistics of both texts  0:00 < 0:\d\d", drawn(line, 40))
    assert re.fullmatch(r". statistics o…  0:00 < 0:\d\d", drawn(line, 28))


def test_quiet_shows_warnings_alone(recipe_file: Path, tmp_path: Path, capfd) -> None:
    quick = ["training.max_steps=2", "evaluation.steps=1", "evaluation.metric=none", "gate.enabled=false"]
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe_file), "--quiet", *quick])
    assert caught.value.code == 0
    text, talk = capfd.readouterr()
    assert talk.startswith("warning: training.max_steps: 2 steps")
    assert all(line.startswith("warning: ") for line in talk.splitlines()), talk
    assert "What was learned, what was forgotten (plain QLoRA)" in text and "Next" in text
    with pytest.raises(SystemExit):
        main(["train", "gone.yaml", "--quiet"])
    assert capfd.readouterr().err.startswith("error: no recipe at gone.yaml")


def on_screen(arguments: list[object], columns: int = 80) -> str:
    """Everything that a command writes to a terminal."""
    with in_a_terminal(arguments, columns) as (process, screen):
        text = b""
        try:
            while piece := os.read(screen, 65_536):
                text += piece
        except OSError:  # the terminal was closed
            pass
        process.join(60)
        assert process.exitcode == 0, text.decode()
    return text.decode()


def test_plain_is_the_form_of_a_log_on_a_terminal(recipe_file: Path) -> None:
    assert "\x1b[" in on_screen(["preview", recipe_file, "-n", 0])
    text = on_screen(["preview", recipe_file, "-n", 0, "--plain"])
    assert "\x1b" not in text and "[done] tokenizing training rows, " in text


def test_on_a_narrow_terminal_no_line_of_training_wraps(recipe_file: Path) -> None:
    quick = ["training.max_steps=3", "evaluation.metric=none", "evaluation.num_answers=0", "gate.enabled=false"]
    text = on_screen(["train", recipe_file, *quick], columns=40)
    frames = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).strip() for frame in re.split(r"[\r\n]+", text)]
    live = [frame for frame in frames if re.match(r"step \d/3", frame)]
    # Which fields fit, and how often the line is drawn, depends on the machine's speed.
    assert live and all(len(frame) <= 40 and re.search(r"  \d:\d\d( < \d:\d\d)?$", frame) for frame in live), frames
