from itertools import combinations

import pytest

from stillroom.lm.verify import Verifier, gsm8k, numbers, pass_at_k, rejection


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 1,234.50 dollars.", "2469/2"), ("18", "18"), ("-3 and then 7.", "7"), ("none", None), ("1/0", None), ("2/4 of it", "1/2")],
)
def test_numbers_are_canonical(text, answer):
    assert numbers.extract(text) == answer


def test_gsm8k_reads_after_its_mark_only():
    assert gsm8k.accepts("12 + 30 = 42\n#### 42", "42")
    assert not gsm8k.accepts("the answer is 42", "42")
    assert gsm8k.accuracy(["#### 1,000", "#### 2"], ["1000", "3"]) == 0.5


def test_the_vote_clusters_by_the_verifiers_equality_and_ties_go_to_the_first():
    assert numbers.vote(["is 3", "is 0.5", "no answer", "1/2"]) == 1
    assert numbers.vote(["2", "3"]) == 0
    assert numbers.vote(["?", "!"]) is None
    loose = Verifier(lambda t: t or None, lambda a, b: a.lower() == b.lower())
    assert loose.vote(["x", "Yes", "yes"]) == 1


def test_rejection_reports_its_cost():
    kept, cost = rejection([["1", "2"], ["3", "4"]], lambda i, text: text in ("1", "2"))
    assert kept == [["1", "2"], []]
    assert cost.metrics() == {"acceptance": 0.5, "coverage": 0.5, "samples_per_accepted": 2.0}


def test_pass_at_k_by_counting():
    draws = list(combinations([True, True, False, False, False], 3))
    assert pass_at_k(2, 5, 3) == pytest.approx(sum(map(any, draws)) / len(draws))
