"""FID against torch-fidelity's own, with its Inception on random local weights and with a small registered network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion import teachers
from stillroom.metrics import fid as module
from stillroom.metrics.fid import extractor, fid
from stillroom.recipes.diffusion import consistency

from ..diffusion.tiny import ddpm


@pytest.fixture
def fidelity() -> Any:
    """Skips where the extra is absent, or torchvision does not load beside this torch."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity does not import: {error}")
    return torch_fidelity


@pytest.fixture
def small(fidelity: Any) -> str:
    """A registered extractor of six features: means of the four quadrants and two colour differences."""
    name = "quadrants"

    class Quadrants(fidelity.FeatureExtractorBase):  # type: ignore[name-defined, misc]
        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = x.double()
            means = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 2).flatten(1)
            colour = x.mean((2, 3))
            return (torch.cat([means, colour[:, :2] - colour[:, 1:]], 1),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("f",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "f"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    if name not in fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        fidelity.register_feature_extractor(name, Quadrants)
    return name


def images(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 0.7 + shift).clamp(0, 1)


def folder(place: Path, x: torch.Tensor) -> str:
    from PIL import Image

    place.mkdir()
    for i, image in enumerate((x * 255).round().byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    return str(place)


def theirs(fidelity: Any, a: str, b: str, **words: Any) -> float:
    found = fidelity.calculate_metrics(input1=a, input2=b, fid=True, cuda=False, verbose=False, cache=False, save_cpu_ram=True, **words)
    return found["frechet_inception_distance"]


def test_tensors_and_folders_agree_with_torch_fidelity(fidelity: Any, small: str, tmp_path: Path) -> None:
    x, y = images(40, 0), images(50, 1, 0.2)
    a, b = folder(tmp_path / "a", x), folder(tmp_path / "b", y)
    net = extractor(small)
    expected = theirs(fidelity, a, b, feature_extractor=small)
    assert expected > 1
    assert fid(a, b, net) == pytest.approx(expected, rel=1e-6)
    assert fid(x, y, net) == pytest.approx(expected, rel=1e-6)
    assert fid(x, b, net) == pytest.approx(expected, rel=1e-6)
    assert fid(x, x, net) == pytest.approx(0, abs=1e-6)


def test_the_inception_of_torch_fidelity_with_a_local_file(fidelity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights: the published ones need a download. Its real network and preprocessing run all the same."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = str(tmp_path / "inception.pth")
    torch.save({}, file)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3(module.INCEPTION, ["2048"], feature_extractor_weights_path=file).state_dict(), file)
    a, b = folder(tmp_path / "a", images(4, 0)), folder(tmp_path / "b", images(5, 1, 0.3))
    expected = theirs(fidelity, a, b, feature_extractor_weights_path=file)
    assert fid(a, b, extractor(weights=file)) == pytest.approx(expected, rel=1e-3)


def test_the_flag_of_a_recipe_adds_a_column(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    where, real = ddpm(tmp_path / "ddpm"), images(30, 2)
    net = extractor(small)
    monkeypatch.setattr(module, "extractor", lambda: net)
    cfg: dict[str, Any] = {"teacher": f"diffusers:{where}", "updates": 1, "batch": 2, "bank": 4, "levels": 3, "evaluate": 9}
    rows = {}
    for name in ("teacher", folder(tmp_path / "real", real)):
        with Run(tmp_path / f"run-{len(rows)}", store=Store(tmp_path / "store"), plots=False) as run:
            rows[name] = consistency.main(consistency.Config(fid=name, **cfg), run)
    a, b = (metrics["fid"] for metrics in rows.values())
    assert a > 0
    assert b > 0
    assert a != b

    setting = teachers.load(f"diffusers:{where}", fid="teacher")
    x, y = torch.randn(11, 1, 8, 8), torch.randn(9, 1, 8, 8)
    decoded = [(z / 2 + 0.5).clamp(0, 1) for z in (x, y)]
    with Run(tmp_path / "run", plots=False) as run:
        assert setting.evaluate(run, x, y)["fid"] == pytest.approx(fid(*decoded, net), rel=1e-6)


def test_missing_weights_and_too_few_images_are_said(small: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights for inception-v3-compat.*checkpoints"):
        extractor(weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"at least two images.*0 png or jpg files in"):
        fid(tmp_path, tmp_path, extractor(small))
    with pytest.raises(UserError, match=r"not \(2, 4, 8, 8\)"):
        fid(torch.rand(2, 4, 8, 8), torch.rand(2, 4, 8, 8), extractor(small))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    extractor.cache_clear()
    with pytest.raises(UserError, match=r"stillroom\[fid\]"):
        fid(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"stillroom\[fid\]"):  # before the pipeline is even looked for
        teachers.load(f"diffusers:{tmp_path}", fid="teacher")
    with pytest.raises(UserError, match="own yardsticks"):
        teachers.load("ring", fid="teacher")
