import pytest
import torch
from torch import nn

from stillroom.adapt.masked import MaskedViT
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.nets.build import build
from stillroom.nets.vit import Block, MaskedDecoder

SHAPE = {"classes": 3, "channels": 1, "size": 8, "mean": (0.3,), "std": (0.4,)}


def test_block_is_torchs_pre_norm_layer():
    torch.manual_seed(0)
    block = Block(32, 2).double()
    theirs = nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True).double()
    own = block.state_dict()
    names = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "mlp.0.", "linear2.": "mlp.2.",
        "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    theirs.load_state_dict({a + end: own[b + end] for a, b in names.items() for end in ("weight", "bias")})
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x))


def test_class_token_does_not_depend_on_the_order_of_patches():
    torch.manual_seed(0)
    net = build("vit-p2-w32-d2", **SHAPE)
    images = torch.rand(2, 1, 8, 8)
    patches = net.patches(images)
    assert patches.shape == (2, 16, 32)
    torch.testing.assert_close(net.encode(patches[:, torch.randperm(16)])[:, 0], net.features(images))


def test_decoder_puts_visible_patches_in_their_places():
    """Without blocks, a patch's answer depends on itself alone where it is visible, and is the mask token's elsewhere."""
    torch.manual_seed(0)
    net = build("vit-p2-w32-d1", **SHAPE)
    decoder = MaskedDecoder(net, width=16, depth=0)
    kept, latent = torch.tensor([[5, 2], [0, 15]]), torch.randn(2, 3, 32)
    answer = decoder(latent, kept)
    assert answer.shape == (2, 16, 4)
    place = lambda x, patch: decoder.predict(decoder.norm(x + decoder.positions[0, 1 + patch]))
    torch.testing.assert_close(answer[0, 5], place(decoder.embed(latent[0, 1]), 5))
    torch.testing.assert_close(answer[1, 15], place(decoder.embed(latent[1, 2]), 15))
    torch.testing.assert_close(answer[0, 7], place(decoder.mask[0, 0], 7))


def test_a_patch_must_divide_the_image():
    with pytest.raises(UserError, match="patches of 3"):
        build("vit-p3-w32-d1", **SHAPE)


def test_masked_training_runs_in_half_precision_and_moves_all_it_should(tmp_path):
    with Run(tmp_path / "run", 0, engine=make("local", "cpu", "bf16"), plots=False) as run:
        model, optimizer = run.trainable("model", MaskedViT(build("vit-p2-w16-d1", **SHAPE), 0.75), Optimizer("sgd", 0.1))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in run.steps(3):
            errors, hidden = model(torch.rand(6, 1, 8, 8))
            run.update(optimizer, mae=errors, norm=hidden.square().sum(1))
        still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"encoder.head.weight", "encoder.head.bias"}  # nothing looks at the head
