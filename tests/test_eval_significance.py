"""Errors and paired differences, against closed forms and made-up data whose truth is known."""

import random
import statistics

import pytest

from eval.significance import RESAMPLES, difference, holm, least_p, over_seeds, standard_error


def test_the_error_of_independent_values_is_the_textbooks():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    expected = statistics.stdev(values) / len(values) ** 0.5
    assert standard_error(values, range(7)) == pytest.approx(expected)


def test_questions_about_one_image_count_as_one():
    once = [1.0, 0.0, 1.0, 1.0, 0.0]
    five_times = [value for value in once for _ in range(5)]
    images = [number // 5 for number in range(25)]
    assert standard_error(five_times, images) == pytest.approx(standard_error(once, range(5)))
    assert standard_error(five_times, range(25)) < standard_error(five_times, images)


def test_one_cluster_tells_no_error():
    assert standard_error([1.0, 0.0], ["a", "a"]) is None


def test_the_same_answers_do_not_differ():
    found = difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], range(3))
    assert (found.mean, found.p, found.gained, found.lost) == (0.0, 1.0, 0, 0)


def test_a_clear_difference_is_found_with_its_sign():
    first = [0.0] * 60 + [1.0] * 140
    second = [1.0] * 55 + [0.0] * 5 + [1.0] * 135 + [0.0] * 5
    found = difference(first, second, range(200))
    assert found.mean == pytest.approx(0.25)
    assert (found.gained, found.lost) == (55, 5)
    assert 0.15 < found.low < 0.25 < found.high < 0.35
    assert found.p == 1 / RESAMPLES
    back = difference(second, first, range(200))
    assert (back.mean, back.gained, back.lost) == (pytest.approx(-0.25), 5, 55)


def test_noise_is_called_a_difference_as_often_as_it_says():
    draws = random.Random(0)
    calls = 0
    for _ in range(200):
        first = [float(draws.random() < 0.5) for _ in range(120)]
        second = [float(draws.random() < 0.5) for _ in range(120)]
        calls += difference(first, second, range(120)).p < 0.05
    assert 2 <= calls <= 22  # 10 expected; 5 of 1,000,000 draws lie outside


def test_clusters_widen_the_interval():
    first, second = [0.0] * 100, [float(number // 10 % 2) for number in range(100)]
    alone = difference(first, second, range(100))
    together = difference(first, second, [number // 10 for number in range(100)])
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_one_image_tells_no_difference():
    assert difference([0.0], [1.0], ["a"]) is None
    assert difference([0.0, 0.0], [1.0, 1.0], ["a", "a"]) is None


def test_few_images_are_no_certainty():
    found = difference([0.0] * 4, [1.0, 1.0, 1.0, 0.0], ["a", "b", "c", "d"])
    assert found.p >= 0.25  # three changes one way: 2 / 2**3 by the sign test
    assert least_p([1.0, -1.0, 0.5, 0.0], ["a", "a", "b", "c"]) == 1.0  # image a's changes cancel


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_differences_over_seeds_are_students():
    mean, low, high, p = over_seeds([0.70, 0.72, 0.71], [0.73, 0.76, 0.72], paired=True)  # 0.03, 0.04, 0.01
    error = statistics.stdev([0.03, 0.04, 0.01]) / 3**0.5
    assert mean == pytest.approx(0.08 / 3)
    assert (high - low) / 2 == pytest.approx(4.3027 * error, rel=1e-3)  # the table's t for 2 degrees of freedom
    t = mean / error
    assert p == pytest.approx(1 - t / (t * t + 2) ** 0.5, abs=1e-5)  # closed form of 2 degrees of freedom
    mean, low, high, p = over_seeds([1.0, 2.0], [4.0, 5.0], paired=False)  # Welch's rule makes 2 of these
    assert (mean, (high - low) / 2) == (3.0, pytest.approx(4.3027 * 0.5**0.5, rel=1e-3))
    assert p == pytest.approx(1 - 18**0.5 / 20**0.5, abs=1e-5)
    assert over_seeds([0.5, 0.5], [0.5, 0.5], paired=True) == (0.0, 0.0, 0.0, 1.0)
    mean, low, high, p = over_seeds([0.5, 0.6], [0.6, 0.7], paired=True, images=(0.05, 3))  # seeds say it is certain
    assert p == pytest.approx(1 - 2 / 6**0.5, abs=1e-5)
