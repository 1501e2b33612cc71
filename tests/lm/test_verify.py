from itertools import combinations

import pytest

from stillroom.lm.verify import Verifier, answers, gsm8k, marked, numbers, only_number, pass_at_k, rejection


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 1,234.50 dollars.", "2469/2"),
        ("18", "18"),
        ("-3 and then 7.", "7"),
        ("none", None),
        ("1/0", None),
        ("2/4 of it", "1/2"),
        ("10-4", "4"),
        ("(10)-4", "4"),
        ("x = -4", "-4"),
        ("n-4", "4"),
    ],
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
    for correct, samples, k in ((1, 2, 4), (1, 2, 0), (3, 2, 1)):
        with pytest.raises(ValueError, match="cannot be told"):
            pass_at_k(correct, samples, k)
    assert pass_at_k(0, 2, 2) == 0.0


@pytest.mark.parametrize(
    ("given", "reference", "right"),
    [
        ("Paris", "Paris", True), ("the  paris.", "Paris", True), ("Lyon", "Paris", False), ("Louis 14th", "Louis 14th", True),
        ("Louis 15th", "Louis 14th", False), ("14", "Louis 14th", False), ("42 apples", "42", True), ("42.0", "$42.", True),
        ("43", "42", False), ("None", "42", False), ("0.5", "1/2", True), ("50", "50%", True), ("x", "-3", False), ("", "x", False),
    ],
)  # fmt: skip
def test_facts_are_compared_as_words_and_numbers_as_numbers(given, reference, right):
    assert answers.accepts(given, reference) == right
    assert marked.accepts(f"12 + 1\n#### {given}", reference) == right
    assert not marked.accepts(given, reference)


def test_only_a_number_is_one():
    assert only_number("$1,000.50") == "2001/2"
    assert only_number("-3%") == "-3"
    assert only_number("14th") is None
    assert answers.vote(["Paris", "Lyon", "the Lyon"]) == 1
