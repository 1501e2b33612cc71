"""Closed forms of every process and every pair of processes, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stillroom.diffusion.denoiser import Denoiser, translate
from stillroom.diffusion.exact import Gaussian, Mixture
from stillroom.diffusion.processes import DDPM, EDM, VP, Flow, Process, ReversedFlow, Trig
from stillroom.diffusion.sampling import ddim, gamma_step, heun, sample
from tests.diffusion.every import PROCESSES, RHOS, each


def gaussian(process: Process) -> Gaussian:
    return Gaussian(torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64), 0.6, process)


@each()
def test_time_inverts_rho(process: Process) -> None:
    torch.testing.assert_close(process.rho(process.time(RHOS)), RHOS, rtol=1e-9, atol=1e-12)


@each()
def test_ends_and_direction(process: Process) -> None:
    assert float(process.rho(process.clean)) == 0.0
    times = process.grid(7, shift=3.0)
    rhos = [float(process.rho(t)) for t in times]
    assert times[0] == process.noisy
    assert times[-1] == process.clean
    assert rhos == sorted(rhos, reverse=True)


def test_grids() -> None:
    assert [round(t, 4) for t in Flow().grid(4, shift=5.0)] == [1.0, 0.9375, 0.8333, 0.625, 0.0]
    assert [round(t, 4) for t in ReversedFlow().grid(4, shift=3.0)] == [0.0, 0.1, 0.25, 0.5, 1.0]
    assert VP().grid(4) == [999.0, 749.0, 499.0, 249.0, -1.0]
    i = np.arange(18) / 17
    karras = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(EDM().grid(18), [*karras, 0.0], rtol=1e-9)


@each()
def test_random_times_stay_in_their_range(process: Process) -> None:
    torch.manual_seed(0)
    t = process.uniform(500, 0.2, 0.7, shift=2.0)
    rho = process.rho(t)
    low, high = (process.rho(process.place(2 * u / (1 + u))) for u in (0.2, 0.7))  # shifted after the draw, as a grid is
    assert float(rho.min()) >= float(low)
    assert float(rho.max()) <= float(high)
    assert process.share(float(process.place(0.3))) == pytest.approx(0.3)
    law = process.rho(process.lognormal(20_000)).log()
    if not isinstance(process, VP):
        assert abs(float(law.mean()) + 1.2) < 0.05
        assert abs(float(law.std()) - 1.2) < 0.05


@pytest.mark.parametrize(("betas", "process"), [("scaled", VP()), ("linear", DDPM())])
def test_vp_matches_the_published_betas(betas: str, process: VP) -> None:
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2 if betas == "scaled" else np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - beta)
    k = torch.arange(1000)
    np.testing.assert_allclose(process.alpha(k), np.sqrt(kept), rtol=1e-12)
    np.testing.assert_allclose(process.sigma(k), np.sqrt(1 - kept), rtol=1e-12)


@each()
def test_rates_are_derivatives(process: Process) -> None:
    t = process.time(RHOS)
    if isinstance(process, VP):
        with pytest.raises(TypeError):
            process.rates(t)
        return
    h = 1e-6
    da, ds = process.rates(t)
    torch.testing.assert_close(da, (process.alpha(t + h) - process.alpha(t - h)) / (2 * h), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(ds, (process.sigma(t + h) - process.sigma(t - h)) / (2 * h), atol=1e-7, rtol=1e-6)


@each()
def test_wronskian_is_constant(process: Process) -> None:
    if not isinstance(process, VP):
        t = process.time(RHOS)
        da, ds = process.rates(t)
        found = process.alpha(t) * ds - da * process.sigma(t)
        torch.testing.assert_close(found, torch.full_like(found, process.wronskian))


@each()
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "velocity", "score", "edm"])
def test_training_target_is_the_output_that_reads_as_the_truth(process: Process, kind: str) -> None:
    """A network that answers `target` at x_t is read as the true pair, in every parametrization."""
    if isinstance(process, VP) and kind == "velocity":
        return
    x0, eps = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = process.time(torch.tensor([0.05, 0.3, 0.9, 1.5, 2.0, 2.5], dtype=torch.float64))
    if kind == "v":  # defined for processes of unit norm
        norm = process.norm(t)
        if not torch.allclose(norm, torch.ones_like(norm)):
            return
    denoiser = Denoiser(torch.nn.Identity(), process, kind)  # type: ignore[arg-type]
    pair = denoiser.read(denoiser.target(x0, eps, t), process.mix(x0, eps, t), t)
    torch.testing.assert_close(pair.x0, x0)
    torch.testing.assert_close(pair.eps, eps)


@each()
def test_kernel_composes_marginals(process: Process) -> None:
    s, t = process.time(0.4), process.time(2.5)
    ratio, spread = process.kernel(s, t)
    torch.testing.assert_close(ratio * process.alpha(s), process.alpha(t))
    torch.testing.assert_close(ratio**2 * process.sigma(s) ** 2 + spread**2, process.sigma(t) ** 2)


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(range(len(PROCESSES)), 2)))
def test_translation_there_and_back_and_the_teachers_answer(a: int, b: int) -> None:
    """A -> B -> A is the identity, and the exact denoiser of A asked from B is the exact denoiser of B."""
    first, second = PROCESSES[a], PROCESSES[b]
    torch.manual_seed(0)
    t = first.time(RHOS)
    x = torch.randn(len(RHOS), 3, dtype=torch.float64)
    y, s = translate(x, t, first, second)
    back, time = translate(y, s, second, first)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(time, t, rtol=1e-6, atol=1e-9)
    data = gaussian(first)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, clock: torch.Tensor, cond: None) -> torch.Tensor:
            return data(x * getattr(first, "sigma_data", 1.0), t).x0

    answer = Denoiser(Net(), first, "x0")(y, s, process=second)
    expected = data(y, s, process=second)
    torch.testing.assert_close(answer.x0, expected.x0, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(answer.eps, expected.eps, rtol=1e-6, atol=1e-8)


@each()
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity", "score", "edm"])
def test_every_parametrization_reads_the_same_pair(process: Process, prediction: str) -> None:
    if (prediction == "velocity" and isinstance(process, VP)) or (prediction == "v" and not isinstance(process, VP)):
        pytest.skip("not defined for this process")
    data = gaussian(process)
    torch.manual_seed(1)
    t = process.time(RHOS)
    x = process.mix(torch.randn(6, 3).double(), torch.randn(6, 3).double(), t)
    truth = data(x, t)
    seen: list[torch.Tensor] = []

    class Net(torch.nn.Module):
        def forward(self, x_in: torch.Tensor, clock: torch.Tensor, cond: None) -> torch.Tensor:
            seen.append(x_in)
            if prediction == "edm":
                rho = RHOS[:, None]
                total = rho**2 + 0.25
                return (truth.x0 - 0.25 / total * x / process.alpha(t)[:, None]) / (rho * 0.5 / total.sqrt())
            if prediction == "velocity":
                return process.velocity(*truth, t) / getattr(process, "sigma_data", 1.0)
            return {
                "x0": truth.x0,
                "eps": truth.eps,
                "v": process.v(*truth, t),
                "score": process.score(truth.eps, t),
            }[prediction]

    pair = Denoiser(Net(), process, prediction)(x, t)  # type: ignore[arg-type]
    torch.testing.assert_close(pair.x0, truth.x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pair.eps, truth.eps, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(process.mix(*pair, t), x, rtol=1e-9, atol=1e-9)
    if prediction == "edm":  # c_in x is the unit-variance input of EDM
        torch.testing.assert_close(seen[0], x / process.alpha(t)[:, None] / (RHOS[:, None] ** 2 + 0.25).sqrt())


@each()
def test_mixture_denoiser_against_the_written_out_posterior(process: Process) -> None:
    torch.manual_seed(2)
    centres, weights, std = torch.randn(4, 2).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 0.3
    mixture = Mixture(centres, std, weights, labels=torch.tensor([0, 0, 1, 1]), process=process)
    t = float(process.time(1.2))
    x = torch.randn(5, 2).double()
    a, s = float(process.alpha(t)), float(process.sigma(t))
    variance = a * a * std * std + s * s
    density = weights * torch.exp(-((x[:, None] - a * centres) ** 2).sum(-1) / (2 * variance))
    single = centres + a * std**2 / variance * (x[:, None] - a * centres)
    for cond, keep in ((None, torch.ones(4)), (torch.full((5,), 1), torch.tensor([0.0, 0, 1, 1]))):
        posterior = density * keep / (density * keep).sum(1, keepdim=True)
        pair = mixture(x, t, cond)
        torch.testing.assert_close(pair.x0, (posterior[..., None] * single).sum(1))
        torch.testing.assert_close(process.mix(*pair, t), x)
    autograd = torch.autograd.functional.jacobian(
        lambda y: torch.exp(-((y[:, None] - a * centres) ** 2).sum(-1) / (2 * variance)).mul(weights).sum(1).log().sum(), x
    )
    torch.testing.assert_close(process.score(mixture(x, t).eps, t), autograd)


@each()
def test_ddim_first_order_heun_second_order(process: Process) -> None:
    data = gaussian(process)
    torch.manual_seed(3)
    start, end = 10.0, 0.05
    x = process.mix(data.sample(16), torch.randn(16, 3).double(), process.time(start))

    def gap(steps: int, step: object) -> float:
        rhos = torch.linspace(start**0.2, end**0.2, steps + 1, dtype=torch.float64) ** 5
        times = [float(process.time(r)) for r in rhos]
        exact = data.flow_map(x, times[0], times[-1])
        return float((sample(data, x, times, step=step) - exact).abs().max())  # type: ignore[arg-type]

    first, second = gap(64, ddim) / gap(128, ddim), gap(64, heun) / gap(128, heun)
    assert 1.8 < first < 2.2
    assert 3.6 < second < 4.5


@each()
def test_one_jump_is_the_same_in_every_process(process: Process) -> None:
    data = gaussian(EDM())
    torch.manual_seed(4)
    x = 3 * torch.randn(8, 3).double()
    expected, _ = ddim(data, x, 3.0, 0.7, None, EDM())
    y, t = translate(x, 3.0, EDM(), process)
    moved, _ = ddim(data, y, float(t), float(process.time(0.7)), None, process)
    torch.testing.assert_close(translate(moved, process.time(0.7), process, EDM())[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", [Flow(), Trig(0.5), VP()])
def test_gamma_zero_is_ddim_and_gamma_one_keeps_only_the_clean_prediction(process: Process) -> None:
    data = gaussian(process)
    x = torch.randn(4, 3).double()
    t, s = float(process.time(4.0)), float(process.time(0.8))
    torch.testing.assert_close(gamma_step(data, x, t, s, None, process, 0.0)[0], ddim(data, x, t, s, None, process)[0])
    torch.manual_seed(0)
    noise = torch.randn_like(x)
    torch.manual_seed(0)
    fresh, pair = gamma_step(data, x, t, s, None, process, 1.0)
    torch.testing.assert_close(fresh, process.mix(pair.x0, noise, s))
    last, pair = gamma_step(data, x, t, process.clean, None, process, 0.5)
    torch.testing.assert_close(last, pair.x0)


@pytest.mark.parametrize("process", [Flow(), Trig(1.0), VP()])
def test_gamma_steps_keep_the_variance_of_the_marginal(process: Process) -> None:
    data = gaussian(process)
    torch.manual_seed(0)
    t, s = float(process.time(0.9)), float(process.time(0.88))
    x = process.mix(data.sample(200_000), torch.randn(200_000, 3).double(), t)
    y, _ = gamma_step(data, x, t, s, None, process, 0.3)
    # near-identical times: the deterministic part keeps the law up to its own discretisation error
    expected = float((process.alpha(s) ** 2 * 0.36 + process.sigma(s) ** 2).sqrt())
    assert abs(float(y.std(0).mean()) - expected) < 0.05 * expected


def test_sde_steps_keep_the_marginals() -> None:
    from functools import partial

    from stillroom.diffusion.sampling import sde_step

    for process in (Flow(), ReversedFlow()):
        data = gaussian(process)
        torch.manual_seed(5)
        times = [float(process.time(r)) for r in torch.linspace(2.0**0.5, 0.3**0.5, 120) ** 2]
        x = process.mix(data.sample(20_000), torch.randn(20_000, 3).double(), times[0])
        y = sample(data, x, times, step=partial(sde_step, strength=0.7))
        a, s = float(process.alpha(times[-1])), float(process.sigma(times[-1]))
        torch.testing.assert_close(y.mean(0), a * data.mean, atol=0.02, rtol=0)
        assert abs(float(y.std(0).mean()) / (a * a * 0.36 + s * s) ** 0.5 - 1) < 0.02


def test_flow_to_trig_closed_form() -> None:
    """F from a flow velocity, as in SANA-Sprint, equals the translated prediction."""
    sd = 0.5
    flow, trig = Flow(), Trig(sd)
    data = gaussian(flow)  # in units of x / sigma_d

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, clock: torch.Tensor, cond: None) -> torch.Tensor:
            return flow.velocity(*data(x, clock), clock)

    net = Net()
    t = torch.tensor([0.1, 0.6, 1.2, 1.5], dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    time = t.sin() / (t.sin() + t.cos())
    q = (time**2 + (1 - time) ** 2).sqrt()
    x_f = x / sd * q[:, None]
    v = net(x_f, time, None)
    F = ((1 - 2 * time)[:, None] * x_f + (1 - 2 * time + 2 * time**2)[:, None] * v) / q[:, None]
    # the data are sigma_d times what the flow network was trained on
    unit = Denoiser(net, flow, "velocity")(x / sd, t, process=Trig(1.0))
    torch.testing.assert_close(Trig(1.0).velocity(*unit, t), F)
    torch.testing.assert_close(trig.velocity(sd * unit.x0, unit.eps, t), sd * F)


def test_trig_is_edm_in_rotated_coordinates() -> None:
    sd, trig = 0.5, Trig(0.5)
    seen = {}

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, clock: torch.Tensor, cond: None) -> torch.Tensor:
            seen["input"] = x
            return x.sin()

    class Negative(Net):
        def forward(self, x: torch.Tensor, clock: torch.Tensor, cond: None) -> torch.Tensor:
            return -super().forward(x, clock, cond)

    t = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    edm = Denoiser(Net(), EDM(), "edm", sd)(x, t, process=trig)
    edm_input = seen["input"]
    rotated = Denoiser(Negative(), trig, "velocity")(x, t)
    torch.testing.assert_close(seen["input"], x / sd)
    torch.testing.assert_close(edm_input, x / sd)
    torch.testing.assert_close(edm.x0, rotated.x0)


def test_half_precision_keeps_the_small_end() -> None:
    x0, eps = torch.randn(2, 64).to(torch.bfloat16), torch.randn(2, 64).to(torch.bfloat16)
    for process in PROCESSES:
        mixed = process.mix(x0, eps, process.time(torch.tensor([0.01, 40.0])))
        assert mixed.dtype == torch.bfloat16
        assert mixed.isfinite().all()
    assert float(VP().rho(0)) == pytest.approx(0.0291672, rel=1e-4)


@each()
def test_a_number_and_a_tensor_of_times_give_the_same(process: Process) -> None:
    kinds = ["x0", "eps", "edm", "score"] + (["v"] if isinstance(process, VP) else ["velocity"])
    x, y = torch.randn(2, 3, 5, dtype=torch.float64)
    for share in (0.0, 0.3, 1.0):
        t = float(process.place(share))
        times = torch.full((3,), t, dtype=torch.float64)
        torch.testing.assert_close(process.mix(x, y, t), process.mix(x, y, times))
        for kind in kinds:
            denoiser = Denoiser(torch.nn.Identity(), process, kind)  # type: ignore[arg-type]
            torch.testing.assert_close(tuple(denoiser.read(y, x, t)), tuple(denoiser.read(y, x, times)))
    assert process.mix(x, y, process.clean) is x


@each()
def test_velocity_is_the_derivative_of_the_path(process: Process) -> None:
    if isinstance(process, VP):
        return
    x0, eps = torch.randn(2, 6, 3, dtype=torch.float64)
    t, h = process.time(RHOS), 1e-6
    slope = (process.mix(x0, eps, t + h) - process.mix(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(process.velocity(x0, eps, t), slope, rtol=1e-6, atol=1e-7)
