"""A teacher's answers for a batch: looked up and asked for alike; both terms of a student's loss against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits
from stillroom.data.images import join
from stillroom.vision import hub, signals

DATA = digits(0, labelled=40, transfer=60)
T, CE, KD = 3.0, 0.3, 0.7 * 9


@pytest.fixture
def teacher(run: Run) -> torch.nn.Module:
    return run.frozen(hub.load_classifier("small:convnet-w8", data=DATA, fresh=True))


def exact(logits: Tensor, teacher_logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the labelled images and KL over all, in float64 and one image at a time."""
    ce = [-logits[i].log_softmax(0)[label[i]] for i in range(len(label)) if label[i] >= 0]
    p, q = (teacher_logits.double() / T).softmax(1), (logits / T).softmax(1)
    kl = [(p[i] * (p[i] / q[i]).log()).sum() for i in range(len(label))]
    return CE * torch.stack(ce).mean() if ce else logits.sum() * 0, KD * torch.stack(kl).mean()


def test_cached_and_online_logits_are_equal_and_without_gradient(run: Run, teacher) -> None:
    batch = DATA.train.take(torch.tensor([7, 3, 11]))
    cached, online = (signals.logits(run, teacher, DATA.train, augmented=a)(batch.index, batch.images) for a in (False, True))
    torch.testing.assert_close(cached, online, atol=1e-5, rtol=1e-5)
    assert not cached.requires_grad
    assert not online.requires_grad
    turned = signals.logits(run, teacher, DATA.train, augmented=True)(batch.index, batch.images.flip(-1))
    torch.testing.assert_close(turned, teacher(batch.images.flip(-1)))


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("rows", [[0, 3, 11, 39], [50, 3, 99, 11], [50, 99, 60, 70]], ids=["all labelled", "some", "none"])
def test_both_terms_and_their_gradients(rows: list[int], augmented: bool, run: Run, teacher) -> None:
    assert DATA.transfer is not None
    images = join(DATA.train, DATA.transfer) if max(rows) >= 40 else DATA.train
    terms = signals.labels_and_teacher(run, teacher, Batches(images, 4, 0), T, ce_weight=CE, kd_weight=KD, augmented=augmented)
    index, image, label = images.take(torch.tensor(rows))
    logits = torch.randn(4, 10, requires_grad=True)
    double = logits.detach().double().requires_grad_()
    expected = exact(double, teacher(image), label)
    for _ in range(2):  # what was looked up is not changed in place
        for found, wanted in zip(terms(logits, index, image, label, label), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    given = torch.autograd.grad(sum(terms(logits, index, image, label, label)), logits)[0]
    torch.testing.assert_close(given.double(), torch.autograd.grad(sum(expected), double)[0], atol=1e-5, rtol=1e-5)


def test_the_share_of_a_process_weighs_its_labels_by_those_of_the_whole_batch(run: Run, teacher) -> None:
    assert DATA.transfer is not None
    images = join(DATA.train, DATA.transfer)
    run.accumulate = 2
    terms = signals.labels_and_teacher(run, teacher, Batches(images, 6, 0), T, ce_weight=CE, kd_weight=KD, augmented=False)
    batch = images.take(torch.tensor([1, 2, 70, 3, 80, 90]))
    logits = torch.randn(6, 10, dtype=torch.float64)
    chunks = [terms(logits[s], *(part[s] for part in batch), batch.labels) for s in (slice(0, 3), slice(3, 6))]
    ce, kl = (sum(values) / 2 for values in zip(*chunks, strict=True))
    for found, wanted in zip((ce, kl), exact(logits, teacher(batch.images), batch.labels), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_the_entropy_is_taken_off_only_where_it_is_logged(run: Run, teacher) -> None:
    terms = signals.labels_and_teacher(run, teacher, Batches(DATA.train, 4, 0), 1.0, ce_weight=CE, kd_weight=1.0, augmented=False)
    index, image, label = DATA.train.take(torch.arange(4))
    own = teacher(image).requires_grad_()
    assert terms(own, index, image, label, label)[1].item() == pytest.approx(0, abs=1e-5)
    run.log_now = False
    value = terms(own, index, image, label, label)[1]
    p = own.detach().double().softmax(1)
    assert value.item() == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-4)
