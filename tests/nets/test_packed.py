import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stillroom.core.errors import UserError
from stillroom.nets.build import build
from stillroom.nets.packed import Coded, load_packed, save_packed


@pytest.mark.parametrize(
    "form", [3, "x", {}, [2], [0, 0, 4], [-1, 0, 4], [10**9, 0, 4], [2, -1, 4], [2, 0.5, 4], [2, 0, -4], [2, 0, "4"], [2, 0, 10**9], None]
)
def test_a_damaged_layout_is_named(form, tmp_path):
    net = build("mlp-4", classes=3, channels=1, size=2, mean=(0.5,), std=(0.5,))
    count = net.head.weight.numel()
    one = torch.ones(1, 1)
    save_packed(net, {"head.weight": Coded(torch.arange(count) % 4, torch.linspace(0, 1, 4), one, one, 0)}, tmp_path / "x")
    load_packed(net, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as opened:
        layout, parts = json.loads(opened.metadata()["layout"]), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    layout = [form if entry else entry for entry in layout]
    save_file(parts, tmp_path / "x", metadata={"layout": json.dumps(layout)})
    with pytest.raises(UserError, match="x could not be read into Classifier"):
        load_packed(net, tmp_path / "x")
