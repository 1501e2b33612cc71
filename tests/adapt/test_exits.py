import pytest
import torch
from torch import nn

from stillroom.adapt.early_exit import EarlyExit, Gates, Heads, Threshold, confidence, exit_probabilities, exits_taken
from stillroom.adapt.exits import Exits, final_norm, find_exits
from stillroom.core.errors import UserError
from stillroom.nets.build import build
from stillroom.nets.wrapped import Wrapped


def small(name: str, size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return build(name, classes=4, channels=3, size=size, mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def vit(kind: str = "vit") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config = (transformers.ViTConfig if kind == "vit" else transformers.DeiTConfig)(**sizes, num_labels=4, hidden_dropout_prob=0.1)
    model = (transformers.ViTForImageClassification if kind == "vit" else transformers.DeiTForImageClassification)(config)
    return Wrapped(model, 8, (0.5,) * 3, (0.5,) * 3).eval()


def student(net: nn.Module, gates=None) -> EarlyExit:
    exits = Exits(net, find_exits(net))
    features, _ = exits(torch.rand(1, 3, 8, 8))
    torch.manual_seed(1)
    heads = Heads([f.shape[1] for f in features], 4)
    if gates is None:
        gates = Gates(len(features))
        with torch.no_grad():
            gates.weight.mul_(6)
    return EarlyExit(exits, heads, gates).eval()


NETS = {"residual-mlp": lambda: small("residual-mlp-w16-d5"), "resnet": lambda: small("resnet14"), "vit": vit, "deit": lambda: vit("deit")}


@pytest.mark.parametrize("kind", NETS)
def test_lazy_inference_gives_what_the_whole_computation_gives(kind):
    model = student(NETS[kind]())
    images = torch.rand(32, 3, 8, 8)
    features, final = model.exits(images)
    logits = torch.stack([*model.heads(features), final], 1)
    # a rule that spreads the images over all exits, whatever the untrained gates would do
    order = torch.randint(len(features) + 1, (32,), generator=torch.Generator().manual_seed(2))
    lazy, taken = model.exits.lazily(images, lambda exit, f, rows: (model.heads.layers[exit](f), order[rows] == exit))
    assert torch.equal(taken, order)
    torch.testing.assert_close(lazy, logits[torch.arange(32), order], atol=1e-5, rtol=1e-4)
    lazy, taken = model.infer(images)
    assert torch.equal(taken, exits_taken(model.gates, logits[:, :-1]))
    torch.testing.assert_close(lazy, logits[torch.arange(32), taken], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_the_work_behind_an_exit_is_not_done(kind):
    model = student(NETS[kind]())
    blocks = [model.exits.net.get_submodule(path) for path in model.exits.paths]
    seen: list[int] = []
    handles = [block.register_forward_pre_hook(lambda m, args, i=i: seen.append((i, len(args[0])))) for i, block in enumerate(blocks)]
    model(torch.rand(6, 3, 8, 8), stop=1)
    assert seen == [(0, 6), (1, 6)]
    seen.clear()
    model.exits.lazily(torch.rand(6, 3, 8, 8), lambda exit, f, rows: (torch.zeros(len(f), 4), rows < 2 * (exit + 1)))
    assert [count for _, count in seen] == [6, 4, 2][: len(seen)]
    assert len(seen) == min(3, len(blocks))
    for handle in handles:
        handle.remove()
    assert not any(block._forward_hooks for block in blocks)  # none of ours is left behind either


def test_multiply_adds_are_those_of_matrix_products():
    model = student(small("residual-mlp-w16-d5"))
    counts = model.multiply_adds(torch.rand(1, 3, 8, 8))
    stem, block, head = 192 * 16, 2 * 16 * 64, 16 * 4
    assert counts.tolist() == [*(stem + (exit + 1) * (block + head) for exit in range(4)), stem + 5 * (block + head)]


def test_the_backbone_stays_in_eval_mode_and_without_gradient():
    net = vit()
    model = student(net).train()
    assert not any(module.training for module in net.modules())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.exits(images)[1], model.exits(images)[1])
    assert not any(f.requires_grad for f in model.exits(images)[0])


def test_the_feature_of_a_transformer_is_the_class_token_through_the_shared_final_norm():
    net = vit()
    exits = Exits(net, find_exits(net, ["model.vit.layers.*"]))
    assert exits.paths == [f"model.vit.layers.{i}" for i in range(3)]  # the last block has the net's own head
    images = torch.rand(2, 3, 8, 8)
    states = net.model.vit(net.normalise(images), output_hidden_states=True).hidden_states
    for feature, state in zip(exits(images)[0], states[1:-1], strict=True):
        torch.testing.assert_close(feature, net.model.vit.layernorm(state)[:, 0])
    assert final_norm(net, net.model.vit.layers[0]) is net.model.vit.layernorm


def test_exits_by_path():
    net = small("resnet14")
    assert find_exits(net) == [f"body.{i}" for i in range(4, 9)]
    assert find_exits(net, ["body.9", "body.5"]) == ["body.5", "body.9"]
    with pytest.raises(UserError, match=r"--exits layer\.3: Classifier has no such module"):
        find_exits(net, ["layer.3"])
    with pytest.raises(UserError, match="no row of equal blocks"):
        find_exits(small("mlp-8x8"))


def test_confidence_by_hand():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    squares = p**2 / (p**2).sum()
    entropy = lambda q: -(q * q.log()).sum()
    expected = torch.stack([p[0], entropy(p), p[0] - p[1], entropy(squares)])
    torch.testing.assert_close(confidence(p.log() + 3), expected)


def test_gates_decide_in_float32_whatever_the_heads_do():
    """Under autocast heads answer in bfloat16; the numbers that gates see, and what they add up, are float32."""
    torch.manual_seed(0)
    heads, gates = Heads([8] * 3, 4), Gates(3)
    features = [torch.randn(16, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = heads(features)
        assert [u.dtype for u in outputs] == [torch.float32] * 3
        half = torch.stack([u.bfloat16() for u in outputs], 1)
        assert confidence(half).dtype == gates(half).dtype == torch.float32
        taken = exits_taken(gates, half)
    assert torch.equal(taken, exits_taken(gates, half))  # inside of autocast as outside
    assert torch.equal(taken, exits_taken(gates, half.float()))


def reference_walk(g: list[float]) -> tuple[list[float], int]:
    """P and the exit taken, from the definitions, one image at a time."""
    p, conditional, exit = [], [], None
    for i, gate in enumerate(g):
        p.append(max(0.0, min(gate, 1 - sum(g[:i]))))
        survival = 1.0
        for c in conditional:
            survival *= 1 - c
        conditional.append(min(1.0, max(0.0, p[-1] / survival)) if survival > 0 else 0.0)
        if exit is None and conditional[-1] >= 0.5:
            exit = i
    return [*p, 1 - sum(p)], len(g) if exit is None else exit


def test_exit_probabilities_and_rule_follow_the_definitions():
    generator = torch.Generator().manual_seed(3)
    g = torch.rand(200, 5, generator=generator, dtype=torch.float64) * 0.6
    p = exit_probabilities(g)
    torch.testing.assert_close(p.sum(1), torch.ones(200, dtype=torch.float64))
    assert (p >= -1e-12).all()
    # two-class logits whose p_max makes sigmoid(weight p_max + bias) the wanted gate
    gates = Gates(5).double()
    with torch.no_grad():
        gates.weight.zero_()
        gates.weight[:, 0] = 20.0
        gates.bias.fill_(-15.0)
    top = (torch.logit(g.clamp_min(0.01)) + 15) / 20
    logits = torch.stack([top.log(), (1 - top).log()], -1)
    real = torch.sigmoid(gates(logits))
    torch.testing.assert_close(real, g.clamp_min(0.01))
    expected = [reference_walk(row) for row in real.tolist()]
    torch.testing.assert_close(exit_probabilities(real), torch.tensor([e[0] for e in expected], dtype=torch.float64))
    assert exits_taken(gates, logits).tolist() == [e[1] for e in expected]


def test_a_later_gate_can_fire_below_one_half():
    assert reference_walk([0.4, 0.4])[1] == 1  # 0.4 / 0.6 > 0.5: what the rule divides by matters
    assert reference_walk([0.4, 0.2])[1] == 2


def test_thresholds_leave_at_the_first_confident_exit():
    logits = torch.tensor([[[3.0, 0.0], [9.0, 0.0]], [[0.1, 0.0], [0.0, 9.0]], [[0.1, 0.0], [0.0, 0.1]]])
    assert exits_taken(Threshold("p_max", 0.9), logits).tolist() == [0, 1, 2]
    assert exits_taken(Threshold("entropy", -0.3), logits).tolist() == [0, 1, 2]
    assert exits_taken(Threshold("margin", 0.8), logits).tolist() == [0, 1, 2]
    assert exits_taken(Threshold("squares", -0.3), logits).tolist() == [0, 1, 2]


@pytest.mark.parametrize("gates", [None, Threshold("entropy", -0.5)])
def test_a_saved_student_loads_around_its_net(gates, tmp_path):
    net = small("residual-mlp-w16-d5")
    model = student(net, gates)
    model.save(tmp_path, note=1)
    images = torch.rand(5, 3, 8, 8)
    loaded = EarlyExit.load(tmp_path, net)
    assert torch.equal(loaded(images), model(images))
    (tmp_path / "exits.json").unlink()
    with pytest.raises(UserError, match="holds no early-exit student"):
        EarlyExit.load(tmp_path, net)
