"""Where runs stood at equal loss, against calculations by hand."""

from __future__ import annotations

import math

import pytest

from folora_q.report.trajectory import Point, at_loss, equal_loss, train_losses, trajectory

A = [Point(0, 3.0, 0.0, 1.0), Point(10, 2.0, 0.1, 0.9), Point(20, 1.0, 0.4, 0.7)]
B = [Point(0, 3.0, 0.0, 1.0), Point(10, 1.6, 1.0, 0.5)]


def test_the_equal_loss_is_the_worst_of_the_best() -> None:
    assert equal_loss([A, B]) == 1.6
    assert equal_loss([A, [*B, Point(None, 1.2, 1.5)]]) == 1.2  # the final evaluation counts
    assert equal_loss([A, []]) is None
    assert equal_loss([]) is None


def test_between_two_measurements_kl_is_geometric_and_agreement_linear() -> None:
    found = at_loss(A, 1.6)
    assert found is not None and found.interpolated
    assert found.between == (A[1], A[2])
    # 1.6 is 4/10 of the way from 2.0 to 1.0: 0.1^0.6 * 0.4^0.4.
    assert found.kl == pytest.approx(0.1**0.6 * 0.4**0.4, rel=1e-12)
    assert found.agreement == pytest.approx(0.9 * 0.6 + 0.7 * 0.4)


def test_from_a_kl_of_zero_it_is_linear() -> None:
    found = at_loss(A, 2.25)
    assert found is not None and found.kl == pytest.approx(0.075) and found.agreement == pytest.approx(0.925)


def test_a_measured_loss_is_not_interpolated() -> None:
    found = at_loss(B, 1.6)
    assert found is not None and not found.interpolated and found.kl == 1.0 and found.between == (B[1],)
    only_the_end = [Point(None, 0.5, 0.2, 0.8)]
    assert at_loss(only_the_end, 0.5).kl == 0.2
    assert at_loss(only_the_end, 0.6) is None
    assert at_loss([], 0.6) is None


def test_the_first_time_counts_where_the_loss_goes_up_and_down() -> None:
    points = [Point(0, 3.0, 0.0), Point(1, 1.0, 0.5), Point(2, 2.0, 0.6), Point(3, 1.5, 0.7)]
    found = at_loss(points, 1.5)
    assert found is not None and found.between == (points[0], points[1])
    assert at_loss(points, 0.9) is None and at_loss(points, 3.5) is None


def test_a_number_that_one_end_lacks_is_not_made_up() -> None:
    found = at_loss([Point(0, 2.0), Point(1, 1.0, 0.5)], 1.5)
    assert found is not None and found.kl is None and found.agreement is None


def test_metrics_are_read_by_step_and_what_is_no_number_is_left_out() -> None:
    lines = [
        {"step": 10, "eval_loss": 2.0, "eval_kl": 0.5, "eval_top1_agreement": 0.9},
        {"step": 10, "loss": 2.5},
        {"step": 0, "eval_loss": 3.0},
        {"step": 10, "eval_loss": 1.9},  # measured again after a resume
        {"step": 20, "eval_loss": math.nan},
        {"step": 30, "eval_loss": "1"},
        {"step": "40", "eval_loss": 1.0},
        {"step": 50, "eval_loss": True},
        {"task_loss": 2.0},
        {"step": 20, "loss": math.inf},
    ]
    assert trajectory(lines) == [Point(0, 3.0), Point(10, 1.9)]
    assert train_losses(lines) == [(10, 2.5)]
