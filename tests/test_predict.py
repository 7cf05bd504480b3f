"""Predictors: how widths are read, regression and Transformer by hand, and what is learnt from data."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_dbs import Budget, WidthSpace
from nni_dbs.cost import Bounds
from nni_dbs.errors import TrainingError
from nni_dbs.pool import draw, tilted
from nni_dbs.predict import (
    Encoder,
    Options,
    Predictor,
    TransformerPredictor,
    Trend,
    boosting,
    budget_excess,
    gaussian_process,
    kendall_tau,
    mlp,
    ridge,
    score_loss,
)
from tests.helpers import bound, chain, truth


def band(space: WidthSpace, bounds: Bounds, n: int, seed: int = 0) -> Tensor:
    """n different networks (n, G) between 80 % and 105 % of the budget, in random order."""
    generator = torch.Generator().manual_seed(seed)
    pool = draw(space, tilted(space, bounds, 0.93), 4 * n + 200, generator)
    used = budget_excess(pool, bounds)[:, 0] / 5 + 1
    pool = pool[(used > 0.8) & (used < 1.05)].unique(dim=0)
    assert len(pool) >= n
    return pool[torch.randperm(len(pool), generator=generator)[:n]]


def uniform(space: WidthSpace, n: int, seed: int = 0) -> Tensor:
    """n networks (n, G) of uniformly drawn choices."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([space.encode(space.sample(generator)) for _ in range(n)])


@functools.cache
def data(n: int) -> tuple[WidthSpace, Tensor, Tensor]:
    """The synthetic problem with ten groups of ten options: n networks of the band and their scores."""
    space, cost, _ = chain(10, 40, 4)
    pool = band(space, bound(0.5, cost), 1256)[:n]
    return space, pool, truth(space, pool)


def small(space: WidthSpace, bounds: Bounds | None = None, **kwargs: Any) -> TransformerPredictor:
    """A Transformer that is trained within a second."""
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "steps": 40, "members": 3}
    return TransformerPredictor(space, bounds, **{**sizes, **kwargs})


# --- options -----------------------------------------------------------------------------------------


def uneven() -> WidthSpace:
    """Groups of ten, six and two options, and one that can only have its full width."""
    space, _, _ = chain(4, 40, 4)
    return space.within({"2": (0.5, 1), "4": (0.9, 1), "6": (1, 1)})


def fixed_inside() -> WidthSpace:
    """One group can only have half of its full width."""
    space, _, _ = chain(4, 40, 4)
    return space.within({"2": (0.5, 0.5)})


@functools.cache
def options_of(name: str) -> Options:
    return Options(SPACES[name]())


SPACES: dict[str, Callable[[], WidthSpace]] = {
    "even": lambda: chain(10, 40, 4)[0],
    "thinned": lambda: chain(3, 40, 1)[0],
    "uneven": uneven,
    "fixed_inside": fixed_inside,
}


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_networks_of_options_are_corners_and_come_back(make: Callable[[], WidthSpace]) -> None:
    space = make()
    options = Options(space)
    generator = torch.Generator().manual_seed(0)
    networks = torch.stack(
        [
            torch.tensor(
                [
                    space.options(name)[int(torch.randint(len(space.options(name)), (), generator=generator))]
                    for name in space.names
                ],
                dtype=torch.float64,
            )
            for _ in range(50)
        ]
    )
    p = options.encode(networks)
    assert p.shape == (50, *options.shape) and p.dtype == torch.float64
    assert torch.equal(p, options.one_hot(p.argmax(2)))
    assert torch.equal(options.nearest(p), networks)
    assert torch.equal(options.relaxed(p), networks)


def test_columns_are_the_groups_with_a_choice() -> None:
    options = Options(uneven())
    assert options.columns.tolist() == [0, 1, 2]
    assert options.shape == (3, 10)
    assert options.valid.sum(1).tolist() == [10, 6, 2]
    assert options.widths[2].tolist() == [36] + [40] * 9
    assert options.size.tolist() == [[40], [40], [40]]


def test_thinned_options_keep_both_ends() -> None:
    space, _, _ = chain(3, 40, 1)
    options = Options(space, limit=4)
    assert len(space.choices("0")) == 37
    assert options.widths[0].tolist() == [4, 16, 28, 40]


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.floats(4, 40), min_size=4, max_size=4),
    name=st.sampled_from(["uneven", "fixed_inside", "thinned"]),
)
def test_any_width_is_a_pair_of_neighbours_whose_logarithm_is_exact(widths: list[float], name: str) -> None:
    options = options_of(name)
    x = torch.tensor([widths[: len(options.widest)]], dtype=torch.float64)
    x[:, options.columns] = x[:, options.columns].maximum(options.widths[:, 0])
    p = options.encode(x)
    torch.testing.assert_close(p.sum(2), torch.ones_like(p.sum(2)), rtol=0, atol=1e-14)
    assert (p >= 0).all()
    assert (p[:, ~options.valid] == 0).all()
    for weights in p[0]:
        used = weights.nonzero().squeeze(1).tolist()
        assert len(used) == 1 or (len(used) == 2 and used[1] == used[0] + 1)
    expected = (x[:, options.columns] / 40).log()
    torch.testing.assert_close(options.log_ratio(p), expected, rtol=0, atol=1e-13)


def test_widths_outside_the_options_are_the_nearest_end() -> None:
    options = Options(uneven())
    p = options.encode(torch.tensor([[1.0, 1, 1, 40], [99, 99, 99, 40]]))
    assert options.nearest(p).tolist() == [[4, 20, 36, 40], [40, 40, 40, 40]]
    assert torch.equal(p, options.one_hot(p.argmax(2)))


def test_relaxed_widths_are_means_with_a_gradient() -> None:
    options = Options(uneven())
    p = torch.softmax(torch.randn(3, *options.shape, dtype=torch.float64), 2).requires_grad_()
    relaxed = options.relaxed(p)
    expected = sum(p[:, :, k] * options.widths[:, k] for k in range(10))
    torch.testing.assert_close(relaxed[:, :3], expected)
    assert (relaxed[:, 3] == 40).all()
    (slope,) = torch.autograd.grad(relaxed.sum(), p)
    assert torch.equal(slope, options.widths.expand(3, -1, -1))


def test_a_space_without_choice_has_one_point() -> None:
    space = WidthSpace(chain(3, 40, 4)[0].groups, min_ratio=1.0)
    options = Options(space)
    networks = space.encode({}).expand(2, -1)
    p = options.encode(networks)
    assert p.shape == (2, *options.shape) and options.shape[0] == 0
    assert torch.equal(options.relaxed(p), networks)
    assert options.log_ratio(p).shape == (2, 0)


# --- trend -------------------------------------------------------------------------------------------


def regression_by_hand(x: Tensor, y: Tensor, new: Tensor) -> tuple[Tensor, Tensor, tuple[float, int]]:
    """Posterior mean and variance at new points, and the length and number of the ratio, by solving."""
    n, centred = len(y), y - y.mean()
    mean, std = x.mean(0), x.std(0, unbiased=False)
    z, z_new = (((t - mean) / std)[:, std > 1e-9] for t in (x, new))
    eye = torch.eye(n, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor, length: float) -> Tensor:
        apart = ((a.unsqueeze(1) - b) ** 2).mean(2)
        return torch.exp(-0.5 * apart / length**2)

    evidence = {}
    for length in Trend.LENGTHS:
        for number, ratio in enumerate(Trend.RATIOS):
            shape = eye + kernel(z, z, length) / ratio  # covariance of y over the noise
            noise = centred @ torch.linalg.solve(shape, centred) / n
            evidence[length, number] = float(
                -0.5 * (n * math.log(2 * math.pi * noise) + torch.logdet(shape) + n)
            )
    length, number = best = max(evidence, key=evidence.__getitem__)
    ratio = Trend.RATIOS[number]
    shape = kernel(z, z, length) + ratio * eye
    signal = centred @ torch.linalg.solve(shape, centred) / n
    k = kernel(z_new, z, length)
    predicted = y.mean() + k @ torch.linalg.solve(shape, centred)
    variance = signal * (1 - (k * torch.linalg.solve(shape, k.T).T).sum(1))
    return predicted, variance, best


@pytest.mark.parametrize("n", [6, 30])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_trend_is_the_gaussian_process_of_greatest_evidence(n: int, noise: float) -> None:
    x, new = torch.randn(n, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y = 2 + x[:, 0] - 0.5 * x[:, 1] * x[:, 2] + noise * torch.randn(n, dtype=torch.float64)
    mean, variance, (length, number) = regression_by_hand(x, y, new)
    trend = Trend().fit(x, y)
    found, doubt = trend(new)
    assert (trend.length, trend.ratio) == (length, Trend.RATIOS[number])
    torch.testing.assert_close(found, mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(doubt, variance, rtol=1e-6, atol=1e-8)


def test_trend_trusts_data_less_the_noisier_they_are() -> None:
    x = torch.randn(30, 3, dtype=torch.float64)
    noises = torch.randn(30, dtype=torch.float64)
    chosen = [Trend().fit(x, x.sum(1) + noise * noises).ratio for noise in (1e-4, 1e-2, 1e-1, 1.0, 10.0)]
    assert chosen == sorted(chosen) and len(set(chosen)) >= 4


def test_trend_takes_short_kernels_for_rough_functions() -> None:
    x = torch.randn(60, 2, dtype=torch.float64)
    assert Trend().fit(x, x.sum(1)).length == max(Trend.LENGTHS)
    assert Trend().fit(x, (3 * x).sin().sum(1)).length == min(Trend.LENGTHS)


def test_trend_recovers_a_smooth_function() -> None:
    x, new = (torch.rand(n, 3, dtype=torch.float64) for n in (100, 20))
    mean, variance = Trend().fit(x, 3 + x.exp().prod(1))(new)
    torch.testing.assert_close(mean, 3 + new.exp().prod(1), rtol=0, atol=0.02)
    assert variance.max() < 1e-2


def test_a_column_of_zeros_changes_nothing_in_the_trend() -> None:
    x, new = torch.randn(12, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    y = torch.randn(12, dtype=torch.float64)
    wide = [torch.cat([t, torch.zeros(len(t), 1, dtype=torch.float64)], 1) for t in (x, new)]
    for found, expected in zip(Trend().fit(wide[0], y)(wide[1]), Trend().fit(x, y)(new), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_trend_of_constant_columns_and_targets_is_the_constant() -> None:
    x = torch.full((5, 2), 0.3, dtype=torch.float64)
    mean, variance = Trend().fit(x, torch.full((5,), 7.0, dtype=torch.float64))(x + 1)
    assert (mean == 7).all()
    assert (variance < 1e-12).all()


def test_trend_has_the_gradients_of_its_values() -> None:
    x, new = torch.randn(15, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    trend = Trend().fit(x, x.sum(1) + 0.3 * torch.randn(15, dtype=torch.float64))
    assert (trend(new)[1] > 0).all()
    assert torch.autograd.gradcheck(trend, new.requires_grad_())


# --- encoder -----------------------------------------------------------------------------------------


def encoder(options: Options, limits: int = 2, dim: int = 32, depth: int = 2) -> Encoder:
    """Three members in double precision with random weights everywhere, zeros included."""
    network = Encoder(options, limits, 3, dim, depth, torch.Generator().manual_seed(0)).double()
    network.features = network.features.double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def points(options: Options, n: int) -> Tensor:
    """Random relaxed networks (n, L, K) float64 that use no missing option."""
    logits = torch.randn(n, *options.shape, dtype=torch.float64)
    return torch.softmax(logits.masked_fill(~options.valid, -torch.inf), 2)


def everything(network: Encoder, p: Tensor) -> Tensor:
    """All outputs of all members, flat: (E, .)."""
    h = network(p)
    decoded = network.decode(h).masked_fill(~network.valid, 0.0)
    outputs = (h, network.accuracy(h), network.budget(h), decoded)
    return torch.cat([output.flatten(1) for output in outputs], 1)


def test_a_member_s_outputs_depend_on_its_own_parameters_alone() -> None:
    options = Options(uneven())
    network, p = encoder(options), points(options, 4)
    for member in range(3):
        parameters = list(network.parameters())
        slopes = torch.autograd.grad((everything(network, p)[member] ** 2).sum(), parameters)
        for slope in slopes:
            sizes = slope.flatten(1).abs().amax(1)
            assert sizes[member] > 0
            assert (sizes[torch.arange(3) != member] == 0).all()
        before = everything(network, p)
        with torch.no_grad():
            for parameter in parameters:
                parameter[member] += 0.1
        after = everything(network, p)
        changed = (before != after).any(1)
        assert changed.tolist() == [i == member for i in range(3)]


def test_token_is_the_sum_of_group_option_and_width() -> None:
    """Without layers the features are the normalised tokens."""
    options = Options(uneven())
    network = encoder(options, depth=0)
    nn.init.ones_(network.norm["weight"])
    nn.init.zeros_(network.norm["bias"])
    member, group, option, width = 1, 1, 2, 28
    assert options.widths[group, option] == width
    token = (
        network.group[member, group, 0]
        + network.option[member, group, option]
        + network.feature["weight"][member].T @ torch.tensor([width / 40, math.log(1 + width)]).double()
        + network.feature["bias"][member, 0]
    )
    p = options.one_hot(torch.tensor([[0, option, 0]]))
    found = network(p)[member, 0, group]
    torch.testing.assert_close(found, F.layer_norm(token, (32,)), rtol=1e-6, atol=1e-6)


def test_widths_between_two_options_are_mixtures_of_tokens() -> None:
    options = Options(uneven())
    network = encoder(options, depth=0)
    corners = torch.cat([options.one_hot(torch.tensor([[k, 0, 0]])) for k in (3, 4)])
    tokens = raw_tokens(network, corners)[:, :, 0]  # (E, 2, dim)
    mixture = F.layer_norm(0.3 * tokens[:, 0] + 0.7 * tokens[:, 1], (32,))
    expected = mixture * network.norm["weight"].squeeze(1) + network.norm["bias"].squeeze(1)
    found = network(0.3 * corners[:1] + 0.7 * corners[1:])[:, 0, 0]
    torch.testing.assert_close(found, expected)


def test_members_are_torch_s_transformer() -> None:
    """Each with its weights in `nn.TransformerEncoderLayer`: pre-norm, GELU, two heads."""
    options = Options(uneven())
    network, p = encoder(options), points(options, 5)
    assert network.heads == 2
    tokens = raw_tokens(network, p)
    for member in range(3):
        h = tokens[member]
        for block in network.blocks:
            h = torch_layer(block, member)(h)
        expected = F.layer_norm(h, (32,), network.norm["weight"][member, 0], network.norm["bias"][member, 0])
        torch.testing.assert_close(network(p)[member], expected, rtol=1e-9, atol=1e-9)


def test_accuracy_and_budget_heads_read_the_mean_of_the_tokens() -> None:
    options = Options(uneven())
    network = encoder(options)
    h = torch.randn(3, 4, 3, 32, dtype=torch.float64)
    for member in range(3):

        def head(first: Any, second: Any, member: int = member) -> Tensor:
            hidden = F.gelu(h[member].mean(1) @ first["weight"][member] + first["bias"][member])
            return hidden @ second["weight"][member] + second["bias"][member]

        score, excess = head(network.head1, network.head2), head(network.budget1, network.budget2)
        torch.testing.assert_close(network.accuracy(h)[member], score.squeeze(1))
        torch.testing.assert_close(network.budget(h)[member], excess)


def raw_tokens(network: Encoder, p: Tensor) -> Tensor:
    """Tokens (E, N, L, dim) before any layer."""
    width = torch.einsum("rf,efd->erd", network.features[0], network.feature["weight"])
    width = (width + network.feature["bias"]).view_as(network.option)
    return torch.einsum("nlk,elkd->enld", p, network.group + network.option + width)


def torch_layer(block: Any, member: int) -> nn.TransformerEncoderLayer:
    """Torch's own layer with a member's weights."""
    dim = block["norm1"]["weight"].shape[-1]
    layer = nn.TransformerEncoderLayer(
        dim, dim // 16, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()

    def copy(target: Any, source: str, prefix: str = "") -> None:
        getattr(target, f"{prefix}weight").copy_(block[source]["weight"][member].T.squeeze())
        getattr(target, f"{prefix}bias").copy_(block[source]["bias"][member, 0])

    with torch.no_grad():
        copy(layer.norm1, "norm1")
        copy(layer.norm2, "norm2")
        copy(layer.self_attn, "qkv", "in_proj_")
        copy(layer.self_attn.out_proj, "project")
        copy(layer.linear1, "widen")
        copy(layer.linear2, "narrow")
    return layer


def test_gradients_by_relaxed_networks_are_finite_differences() -> None:
    options = Options(chain(3, 16, 4)[0])
    network, p = encoder(options, dim=16), points(options, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: everything(network, p), (p,))


def test_networks_of_a_batch_do_not_mix() -> None:
    options = Options(uneven())
    network, p = encoder(options), points(options, 6)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(network(p[order]), network(p)[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(network(p[:1]), network(p)[:, :1], rtol=0, atol=1e-12)


def test_missing_options_are_never_decoded() -> None:
    options = Options(uneven())
    network = encoder(options)
    logits = network.decode(network(points(options, 4)))
    assert logits.shape == (3, 4, *options.shape)
    assert torch.equal(logits.isinf(), (~options.valid).expand(logits.shape))


# --- losses ------------------------------------------------------------------------------------------


def loss_by_hand(scores: Tensor, y: Tensor, weight: Tensor, margin: float, apart: float) -> Tensor:
    losses = []
    for s, w in zip(scores, weight, strict=True):
        seen = [i for i in range(len(y)) if w[i] > 0]
        pairs = [(i, j) for i in seen for j in seen if y[i] - y[j] > apart]
        ranking = sum(max(0.0, margin - float(s[i] - s[j])) for i, j in pairs) / max(len(pairs), 1)
        squared = sum(float(s[i] - y[i]) ** 2 for i in seen) / len(seen)
        losses.append(ranking + 0.5 * squared)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("margin", "apart"), [(0.1, 0.1), (0.5, 0.0), (0.0, 0.7)])
def test_score_loss_is_the_double_loop(margin: float, apart: float) -> None:
    scores, y = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    weight = (torch.rand(4, 9) < 0.7).double()
    found = score_loss(scores, y, weight, margin, apart)
    torch.testing.assert_close(found, loss_by_hand(scores, y, weight, margin, apart))


def test_score_loss_of_equal_targets_is_half_the_squared_error() -> None:
    scores, y = torch.randn(2, 5, dtype=torch.float64), torch.full((5,), 0.4, dtype=torch.float64)
    found = score_loss(scores, y, torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(found, 0.5 * ((scores - y) ** 2).mean(1))


def test_networks_of_weight_zero_are_not_seen_at_all() -> None:
    scores, y = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    weight = torch.ones(2, 8, dtype=torch.float64)
    weight[0, :3] = 0
    scores.requires_grad_()
    loss = score_loss(scores, y, weight)
    (slope,) = torch.autograd.grad(loss.sum(), scores)
    assert (slope[0, :3] == 0).all()
    assert (slope[0, 3:] != 0).all() and (slope[1] != 0).all()
    other = y.clone()
    other[:3] = 100.0
    changed = score_loss(scores, other, weight)
    assert changed[0] == loss[0]
    assert changed[1] != loss[1]
    alone = score_loss(scores[:1, 3:], y[3:], weight[:1, 3:])
    torch.testing.assert_close(alone[0], loss[0])


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_tau_is_the_count_of_ordered_pairs(ties: bool) -> None:
    a, b = torch.randn(40), torch.randn(40)
    b += a
    if ties:
        a, b = a.round(), b.round()
    pairs = list(itertools.combinations(range(40), 2))
    same = sum(int(torch.sign((a[i] - a[j]) * (b[i] - b[j]))) for i, j in pairs)
    apart = [sum(bool(t[i] != t[j]) for i, j in pairs) for t in (a, b)]
    assert kendall_tau(a, b) == pytest.approx(same / math.sqrt(apart[0] * apart[1]), abs=1e-12)
    assert kendall_tau(a, a) == pytest.approx(1)
    assert kendall_tau(a, -a) == pytest.approx(-1)
    assert math.isnan(kendall_tau(a, torch.ones(40)))


@pytest.mark.parametrize("n", [0, 1])
def test_kendall_tau_of_less_than_two_is_not_a_number(n: int) -> None:
    assert math.isnan(kendall_tau(torch.zeros(n), torch.zeros(n)))


def test_budget_excess_is_five_times_the_share_over_the_limit() -> None:
    space, flops, params = chain(3, 16, 4)
    bounds = Budget.parse({"flops": 0.5, "params": 0.25}).bound({"flops": flops, "params": params})
    networks = uniform(space, 5)
    found = budget_excess(networks, bounds)
    expected = [
        [5 * (flops(space.decode(row)) / int(0.5 * flops.full) - 1) for row in networks],
        [5 * (params(space.decode(row)) / int(0.25 * params.full) - 1) for row in networks],
    ]
    assert found.shape == (5, 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).T)
    assert torch.autograd.gradcheck(lambda w: budget_excess(w, bounds), networks.requires_grad_())


# --- what all predictors have in common --------------------------------------------------------------


def tau_or_zero(predicted: Tensor, measured: Tensor) -> float:
    """Kendall's tau, 0 where all predictions are the same."""
    return 0.0 if (predicted == predicted[0]).all() else kendall_tau(predicted, measured)


PREDICTORS: dict[str, Callable[[WidthSpace], Predictor]] = {
    "ridge": ridge,
    "gaussian_process": gaussian_process,
    "boosting": boosting,
    "mlp": mlp,
    "transformer": lambda space: small(space),
    "transformer_without_trend": lambda space: small(space, trend=False, steps=80),
}
every_predictor = pytest.mark.parametrize("make", PREDICTORS.values(), ids=PREDICTORS)
Maker = Callable[[WidthSpace], Predictor]


@every_predictor
def test_fits_and_predicts(make: Maker) -> None:
    space, pool, y = data(264)
    known, new = pool[:64], pool[64:]
    predictor = make(space)
    held_out = predictor.fit(known, y[:64])
    prediction = predictor.predict(new)
    assert held_out.shape == (64,) and held_out.dtype == torch.float64
    for values in prediction:
        assert values.shape == (200,) and values.dtype == torch.float64
        assert torch.isfinite(values).all()
    assert (prediction.std > 0).all()
    assert kendall_tau(prediction.mean, y[64:]) > 0.3
    assert kendall_tau(held_out, y[:64]) > 0.3
    assert abs(float(prediction.mean.mean() - y[:64].mean())) < float(y[:64].std())


def hurried(make: Maker, space: WidthSpace) -> Predictor:
    """With fewer iterations, where it does not matter how good the fit is."""
    predictor: Any = make(space)
    if make is boosting:
        predictor.regressor.set_params(n_estimators=20)
    if make is mlp:
        predictor.regressor.set_params(mlpregressor__max_iter=20)
    return predictor


@every_predictor
def test_comes_back_from_its_state(make: Maker) -> None:
    space, pool, y = data(8)
    one, restored = hurried(make, space), hurried(make, space)
    restored.load_state_dict(one.state_dict())  # of a predictor that is not fitted
    one.fit(pool, y)
    restored.load_state_dict(one.state_dict())
    for values, expected in zip(restored.predict(pool), one.predict(pool), strict=True):
        assert torch.equal(values, expected)


@every_predictor
def test_held_out_predictions_of_shuffled_scores_know_nothing(make: Maker) -> None:
    space, pool, y = data(100)
    shuffled = y[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    assert abs(tau_or_zero(make(space).fit(pool, shuffled), shuffled)) < 0.2


@pytest.mark.parametrize("name", ["ridge", "transformer", "transformer_without_trend"])
def test_scores_in_other_units_give_predictions_in_these(name: str) -> None:
    """By powers of two, so that rounding does not tell the two apart."""
    make = PREDICTORS[name]
    space, pool, y = data(24)
    plain, scaled = make(space), make(space)
    held_out = plain.fit(pool, y)
    torch.testing.assert_close(scaled.fit(pool, 1024 * y), 1024 * held_out, rtol=1e-6, atol=1e-3)
    expected, found = plain.predict(pool), scaled.predict(pool)
    torch.testing.assert_close(found.mean, 1024 * expected.mean, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found.std, 1024 * expected.std, rtol=1e-6, atol=1e-3)


@every_predictor
def test_equal_scores_predict_that_score(make: Maker) -> None:
    space, pool, _ = data(12)
    predictor = hurried(make, space)
    held_out = predictor.fit(pool, torch.full((12,), 0.7))
    for values in (held_out, predictor.predict(pool).mean):
        torch.testing.assert_close(values, torch.full((12,), 0.7).double(), rtol=0, atol=1e-6)
    assert torch.isfinite(predictor.predict(pool).std).all()


@every_predictor
def test_bad_data_are_refused(make: Maker) -> None:
    space, pool, y = data(12)
    predictor = make(space)
    with pytest.raises(TrainingError, match="at least 4 evaluated networks, not 3"):
        predictor.fit(pool[:3], y[:3])
    for bad in (math.nan, math.inf):
        with pytest.raises(TrainingError, match="NaN or infinite"):
            predictor.fit(pool, torch.tensor([bad, *y[1:]]))
    with pytest.raises(TrainingError, match="12 networks but 11 scores"):
        predictor.fit(pool, y[:11])


@pytest.mark.parametrize("name", ["ridge", "gaussian_process", "transformer"])
def test_doubt_grows_away_from_the_data(name: str) -> None:
    space, _, _ = chain(4, 40, 4)
    wide = space.within(dict.fromkeys(space.names, (0.6, 1)))
    known = uniform(wide, 40)
    predictor = PREDICTORS[name](space)
    predictor.fit(known, truth(space, known))
    far = space.encode(space.smallest()).unsqueeze(0)
    assert predictor.predict(far).std > 2 * predictor.predict(known).std.max()


# --- the Transformer predictor -----------------------------------------------------------------------


@pytest.mark.parametrize("trend", [True, False])
def test_held_out_predictions_come_from_members_that_never_saw_the_fold(trend: bool) -> None:
    """Two scores of one fold change places: nothing that the fold's member is trained on has changed.

    Whole numbers of mean zero keep mean and deviation the same to the last bit, after both fits.
    """
    space, pool, y = data(60)
    y = (64 * (y - y.mean())).round()
    y[49] -= y[:50].sum()
    y[59] -= y.sum()
    fold = torch.arange(60) % 3 == 1
    ranked = y.where(fold, torch.inf).argsort()
    i, j = int(ranked[9]), int(ranked[10])  # neighbours, so that the early stop stays as well
    other = y.clone()
    other[[i, j]] = y[[j, i]]
    assert not torch.equal(y, other) and max(i, j) < 49
    runs = []
    for scores in (y, other):
        predictor = small(space, trend=trend, lr=1e-2)
        first, step = predictor.fit(pool[:50], scores[:50]), predictor.best_step
        runs.append((first, predictor.fit(pool, scores), step, predictor.best_step))
    assert runs[0][2:] == runs[1][2:]
    assert trend or runs[0][2] > 0
    for one, two in zip(runs[0][:2], runs[1][:2], strict=True):
        own = fold[: len(one)]
        assert torch.equal(one[own], two[own])
        assert (one[~own] != two[~own]).all()


def test_held_out_predictions_are_those_of_the_fold_s_member() -> None:
    space, pool, y = data(30)
    predictor = small(space, trend=False)
    held_out = predictor.fit(pool, y)
    with torch.no_grad():
        members = predictor.network.accuracy(predictor.network(predictor.options.encode(pool).float()))
    expected = torch.stack([members[i % 3, i] for i in range(30)]).double() * predictor.scale + predictor.mean
    assert torch.equal(held_out, expected)


def closed(predictor: TransformerPredictor) -> bool:
    """Whether the Transformer adds nothing to the trend."""
    return all(bool((parameter == 0).all()) for parameter in predictor.network.head2.values())


def noise_only(seed: int) -> tuple[WidthSpace, Tensor, Tensor]:
    """Networks whose scores are a linear function of the logarithms of their widths, and noise."""
    space, _, _ = chain(4, 40, 4)
    pool = uniform(space, 60, seed)
    x = (pool / 40).log()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(60, generator=generator, dtype=torch.float64)
    return space, pool, x.sum(1) + 0.1 * noise


def test_where_the_trend_leaves_noise_the_transformer_adds_nothing() -> None:
    shut = []
    for seed in range(8):
        space, pool, y = noise_only(seed)
        predictor = small(space, seed=seed)
        predictor.fit(pool, y)
        shut.append(closed(predictor))
        assert shut[-1] == (predictor.best_step == 0)
        if shut[-1]:
            mean, _ = Trend().fit((pool / 40).log(), (y - predictor.mean) / predictor.scale)(
                (pool / 40).log()
            )
            expected = mean * predictor.scale + predictor.mean
            torch.testing.assert_close(predictor.predict(pool).mean, expected, rtol=0, atol=1e-9)
    assert sum(shut) >= 6


def test_what_the_trend_cannot_express_opens_the_gate() -> None:
    """A value for each option of each group, at random."""
    space, _, _ = chain(3, 40, 4)
    pool = uniform(space, 120).unique(dim=0)
    values = torch.randn(3, 10, dtype=torch.float64)
    y = (Options(space).encode(pool) * values).sum((1, 2))
    predictor = small(space, steps=150, lr=1e-2)
    held_out = predictor.fit(pool, y)
    assert not closed(predictor) and predictor.best_step > 0
    alone = ridge(space).fit(pool, y)
    assert ((held_out - y) ** 2).mean() < 0.5 * ((alone - y) ** 2).mean()


@pytest.mark.parametrize("n", [4, 5, 7])
@pytest.mark.parametrize("trend", [True, False])
def test_few_networks_are_enough_to_fit(n: int, trend: bool) -> None:
    space, pool, y = data(30)
    predictor = small(space, members=5, trend=trend)
    assert torch.isfinite(predictor.fit(pool[:n], y[:n])).all()
    for values in predictor.predict(pool):
        assert torch.isfinite(values).all()


def test_an_ensemble_of_one_is_refused() -> None:
    """It would have no network to be trained on."""
    space, pool, y = data(12)
    with pytest.raises(ValueError, match="members"):
        small(space, members=1, trend=False).fit(pool, y)


def test_a_seed_gives_one_ensemble() -> None:
    space, pool, y = data(30)
    one, two, other = (small(space, trend=False, seed=seed).fit(pool, y) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_fitting_touches_no_global_random_state() -> None:
    space, pool, y = data(12)
    before = torch.get_rng_state()
    predictor = small(space, bound(0.5, chain(10, 40, 4)[1]), steps=5)
    predictor.FREE_STEPS = 5
    predictor.fit(pool, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_fit_goes_on_from_the_weights_of_the_first() -> None:
    space, pool, y = data(60)
    predictor = small(space, trend=False, lr=1e-4)
    predictor.fit(pool[:40], y[:40])
    weights = {name: t.clone() for name, t in predictor.network.state_dict().items()}
    predictor.lr = 0.0
    predictor.fit(pool, y)
    for name, t in predictor.network.state_dict().items():
        assert torch.equal(t, weights[name])
    predictor.lr = 1e-2
    predictor.fit(pool, y)
    assert predictor.fits == 3 and predictor.best_step == predictor.steps // 4 == 10
    assert any(not torch.equal(t, weights[name]) for name, t in predictor.network.state_dict().items())


def test_a_restored_predictor_goes_on_identically() -> None:
    """With more networks than a batch holds, so that it also draws the same batches."""
    space, pool, y = data(200)
    predictor = small(space, trend=False, lr=1e-4)
    predictor.fit(pool[:40], y[:40])
    before = predictor.predict(pool)
    buffer = io.BytesIO()
    torch.save(predictor.state_dict(), buffer)
    predictor.lr = 1e-2
    held_out = predictor.fit(pool, y)
    after = predictor.predict(pool)
    restored = small(space, trend=False, lr=1e-2, seed=5)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for values, expected in zip(restored.predict(pool), before, strict=True):
        assert torch.equal(values, expected)
    assert torch.equal(restored.fit(pool, y), held_out)
    for values, expected in zip(restored.predict(pool), after, strict=True):
        assert torch.equal(values, expected)
    assert predictor.BATCH < 200 and predictor.best_step > 0
    assert restored.fits == 2 and restored.best_step == predictor.best_step


def test_a_state_is_a_snapshot() -> None:
    space, pool, y = data(60)
    predictor = small(space, lr=1e-2)
    predictor.fit(pool[:40], y[:40])
    state, before = predictor.state_dict(), predictor.predict(pool)
    predictor.fit(pool, y)
    predictor.load_state_dict(state)
    assert torch.equal(predictor.predict(pool).mean, before.mean)


def test_prediction_is_differentiable_by_the_widths() -> None:
    space, pool, y = data(40)
    predictor = small(space, trend=True)
    predictor.fit(pool, y)
    p = predictor.options.encode(pool[:3]).requires_grad_()
    prediction = predictor.standardised(p)
    (slope,) = torch.autograd.grad(prediction.mean.sum() + prediction.std.sum(), p)
    assert slope.shape == p.shape and torch.isfinite(slope).all() and (slope != 0).any()


def test_mean_and_spread_are_those_of_members_and_trend() -> None:
    space, pool, y = data(40)
    predictor = small(space, lr=1e-2)
    predictor.fit(pool, y)
    nn.init.normal_(predictor.network.head2["weight"])
    p, x = predictor.options.encode(pool), predictor.options.log_ratio(predictor.options.encode(pool))
    with torch.no_grad():
        members = predictor.network.accuracy(predictor.network(p.float())).double()
    trend, doubt = Trend().fit(x, (y - y.mean()) / y.std(unbiased=False))(x)
    scale = y.std(unbiased=False)
    found = predictor.predict(pool)
    torch.testing.assert_close(found.mean, (members.mean(0) + trend) * scale + y.mean())
    variance = ((members - members.mean(0)) ** 2).mean(0) + doubt
    torch.testing.assert_close(found.std, variance.sqrt() * scale, rtol=1e-6, atol=1e-9)


def test_many_networks_are_predicted_as_few() -> None:
    space, pool, y = data(40)
    predictor = small(space)
    predictor.fit(pool, y)
    many = pool.repeat(110, 1)
    found = predictor.predict(many)
    assert found.mean.shape == (4400,)
    torch.testing.assert_close(found.mean[-40:], predictor.predict(pool).mean, rtol=0, atol=1e-5)


# --- what it learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trend", [True, False])
def test_learns_the_synthetic_truth_in_small(trend: bool) -> None:
    space, pool, y = data(1256)
    predictor = small(space, trend=trend, steps=80, dim=16, lr=5e-3)
    held_out = predictor.fit(pool[:128], y[:128])
    assert kendall_tau(held_out, y[:128]) > 0.55
    assert kendall_tau(predictor.predict(pool[256:]).mean, y[256:]) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("trend", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_ranks_unseen_networks_of_the_band(share: float, seed: int, trend: bool) -> None:
    space, cost, _ = chain(10, 40, 4)
    pool = band(space, bound(share, cost), 1256, seed)
    y = truth(space, pool, seed)
    predictor = TransformerPredictor(space, seed=seed, trend=trend)
    held_out = predictor.fit(pool[:256], y[:256])
    unseen = kendall_tau(predictor.predict(pool[256:]).mean, y[256:])
    print(f"share {share} seed {seed} trend {trend}: unseen {unseen:.3f}")
    assert unseen >= 0.65
    assert kendall_tau(held_out, y[:256]) >= 0.65


@pytest.mark.slow
@pytest.mark.parametrize("trend", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_learns_nothing_from_shuffled_scores(seed: int, trend: bool) -> None:
    space, cost, _ = chain(10, 40, 4)
    pool = band(space, bound(0.5, cost), 1256, seed)
    y = truth(space, pool, seed)[torch.randperm(1256, generator=torch.Generator().manual_seed(seed))]
    predictor = TransformerPredictor(space, seed=seed, trend=trend)
    held_out = tau_or_zero(predictor.fit(pool[:256], y[:256]), y[:256])
    unseen = tau_or_zero(predictor.predict(pool[256:]).mean, y[256:])
    print(f"seed {seed} trend {trend}: held-out {held_out:.3f} unseen {unseen:.3f}")
    assert abs(held_out) <= 0.2
    assert abs(unseen) <= 0.2


def reconstruction(predictor: TransformerPredictor, noise: float) -> float:
    """Share of options of unseen random networks that the decoder gives back."""
    options = predictor.random_options(500)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        h = predictor.network(predictor.options.one_hot(options).float())
        h = h + noise * torch.randn(h.shape, generator=generator)
        return float((predictor.network.decode(h).argmax(3) == options).double().mean())


def budget_error(predictor: TransformerPredictor, networks: Tensor, bounds: Bounds) -> float:
    """Mean relative error of the cost that the budget heads' mean says."""
    with torch.no_grad():
        h = predictor.network(predictor.options.encode(networks).float())
        predicted = predictor.network.budget(h).mean(0).double() / 5 + 1  # (N, I)
    real = budget_excess(networks, bounds) / 5 + 1
    return float(((predicted - real) / real).abs().mean())


@functools.cache
def with_heads() -> tuple[TransformerPredictor, Bounds, Tensor]:
    """A small predictor with budget head and decoder, on six groups of four options."""
    space, cost, _ = chain(6, 16, 4)
    bounds = bound(0.5, cost)
    pool = band(space, bounds, 200)
    predictor = small(space, bounds, steps=20, members=2, lr=5e-3)
    predictor.FREE_STEPS = 300
    predictor.fit(pool[:40], truth(space, pool[:40]))
    return predictor, bounds, pool


def test_decoder_and_budget_head_in_small() -> None:
    predictor, bounds, pool = with_heads()
    assert reconstruction(predictor, 0.0) >= 0.99
    assert reconstruction(predictor, 0.1) >= 0.95
    assert budget_error(predictor, pool[40:], bounds) <= 0.10


def test_random_options_exist_and_are_uniform() -> None:
    predictor = small(uneven())
    drawn = predictor.random_options(6000)
    counts = predictor.options.valid.sum(1)
    assert drawn.shape == (6000, 3)
    for column, count in zip(drawn.T, counts, strict=True):
        share = torch.bincount(column, minlength=10) / 6000
        assert (share[count:] == 0).all()
        assert ((share[:count] - 1 / count).abs() < 5 * (1 / count / 6000) ** 0.5).all()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_decoder_and_budget_head(share: float) -> None:
    space, cost, _ = chain(10, 40, 4)
    bounds = bound(share, cost)
    pool = band(space, bounds, 1256)
    predictor = TransformerPredictor(space, bounds, dim=64)
    predictor.fit(pool[:256], truth(space, pool[:256]))
    exact, noisy = reconstruction(predictor, 0.0), reconstruction(predictor, 0.1)
    error = budget_error(predictor, pool[256:], bounds)
    print(f"share {share}: reconstruction {exact:.4f}, noisy {noisy:.4f}, budget error {error:.4f}")
    assert exact >= 0.99
    assert noisy >= 0.95
    assert error <= 0.05
