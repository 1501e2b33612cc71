import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from stillroom.data.images import MemorySplit
from stillroom.metrics.classification import ClassificationMetrics, accuracy, evaluate, reliability
from stillroom.metrics.cost import cost, parameters


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(97, 5, generator=generator)
    return logits, (logits + 2 * torch.randn(97, 5, generator=generator)).argmax(-1)


def test_metrics_by_brute_force(predictions):
    logits, labels = predictions
    p, y = softmax(logits.double().numpy(), axis=-1), labels.numpy()
    confidence, right = p.max(-1), p.argmax(-1) == y
    ece = 0.0
    for low in range(10):
        inside = [i for i in range(97) if low / 10 < confidence[i] <= (low + 1) / 10]
        if inside:
            ece += len(inside) / 97 * abs(np.mean(right[inside]) - np.mean(confidence[inside]))

    def area(order):
        return np.mean([np.mean([not right[i] for i in order[: k + 1]]) for k in range(97)])

    ranking, e = area(np.argsort(-confidence)), int((~right).sum())
    best = sum(j / (97 - e + j) for j in range(1, e + 1)) / 97  # the sheet's formula
    metrics = ClassificationMetrics.of(logits, labels)
    expected = {"accuracy": right.mean(), "nll": -np.log(p[range(97), y]).mean(), "ece": ece, "aurc": ranking, "e_aurc": ranking - best}
    assert metrics.dict() == pytest.approx(expected)
    assert best == pytest.approx(area(np.argsort(~right, kind="stable")))
    assert 0 < metrics.e_aurc < metrics.aurc


def test_bins_exclude_their_lower_and_include_their_upper_bound():
    def logits(p: float) -> list[float]:
        return [math.log(p), math.log1p(-p)]

    half = torch.tensor([[0.0, 0.0]], dtype=torch.float64)  # exactly 0.5
    table = reliability(torch.cat([half, torch.tensor([logits(0.55), logits(0.999)])]), torch.tensor([0, 1, 0]))
    assert table.count.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert table.accuracy.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert table.confidence[5].item() == pytest.approx(0.55)
    sure = reliability(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))  # exactly 1
    assert sure.count[9] == 1


def test_all_right_and_all_wrong():
    logits = torch.eye(4) * 10
    right = ClassificationMetrics.of(logits, torch.arange(4))
    wrong = ClassificationMetrics.of(logits, torch.tensor([1, 0, 3, 2]))
    assert (right.accuracy, right.aurc, right.e_aurc) == (1, 0, 0)
    assert (wrong.accuracy, wrong.aurc, wrong.e_aurc) == (0, 1, 0)


def test_evaluate_keeps_order_and_every_mode():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    net[1].eval()
    split = MemorySplit(torch.rand(25, 1, 2, 2), torch.arange(25) % 3)
    logits, labels = evaluate(net, split, batch=7)
    assert [module.training for module in net] == [True, False, True, True]
    assert net.training
    assert torch.equal(labels, split.labels)
    torch.testing.assert_close(logits, net[3](net[1](split.images().flatten(1))))
    assert not logits.requires_grad
    (torch.ones(25, 3, requires_grad=True) * logits).sum().backward()  # they can be targets


def test_modes_return_after_an_error():
    net = nn.Sequential(nn.Linear(9, 2))
    with pytest.raises(RuntimeError):
        evaluate(net, MemorySplit(torch.rand(3, 1, 2, 2), torch.zeros(3)))
    assert net.training


def test_cost_counts_what_a_file_holds(tmp_path):
    from safetensors.torch import save_file

    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 10))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    figures = cost(net, torch.rand(16, 1, 8, 8))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    header = int.from_bytes((tmp_path / "net.safetensors").read_bytes()[:8], "little") + 8
    assert figures["bytes"] == (tmp_path / "net.safetensors").stat().st_size - header
    assert figures["parameters"] == 4 * 9 + 4 + 8 + 2570
    assert figures["latency_ms"] > 0
    assert figures["throughput"] > 0
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_cost_counts_shared_weights_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert cost(net, torch.rand(2, 4))["bytes"] == 64


def test_accuracy_is_the_one_of_all_metrics(predictions) -> None:
    logits, labels = predictions
    assert accuracy(logits, labels) == ClassificationMetrics.of(logits, labels).accuracy
    assert accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)


def test_shared_parameters_count_once_and_buffers_do_not() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert parameters(net) == 12 + 6 + 12
    net[2].weight = net[0].weight
    assert parameters(net) == 12 + 6 + 3
