from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from nni_dbs.data import digits, loader
from nni_dbs.evaluate import (
    cumulative_batchnorm,
    recalibrate_batchnorm,
    saw_batches,
    score,
    use_batch_statistics,
)
from nni_dbs.sampling import sandwich
from nni_dbs.space import WidthSpace
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from nni_dbs.training import accuracy
from torch_pruning_adapters import find_channel_groups, prefix_order, shrink


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    )
    model(5 + torch.randn(8, 3, 8, 8))
    return model


def make_batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 8, 8, generator=generator) * (i + 1) for i in range(count)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_statistics_are_the_average_over_the_batches() -> None:
    model = make_model().eval()
    seen: dict[str, list[Tensor]] = {"1": [], "5": []}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, store=inputs: store.append(args[0].clone())
        )
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    recalibrate_batchnorm(model, make_batches())

    for name, inputs in seen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm2d)
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)
        assert layer.num_batches_tracked == 5
        assert layer.momentum == 0.1
    assert_same(parameters, dict(model.named_parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_and_dropout_stays_off() -> None:
    model = make_model().train()
    model[1].eval()
    model[3].register_forward_hook(lambda module, _, __: dropout_modes.append(module.training))
    dropout_modes: list[bool] = []
    modes = [module.training for module in model.modules()]
    recalibrate_batchnorm(model, make_batches())
    assert [module.training for module in model.modules()] == modes
    assert dropout_modes == [False] * 5


def test_without_batchnorm_no_batch_is_read() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    recalibrate_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), batches()
    )


def test_no_batches_is_an_error_and_keeps_the_statistics() -> None:
    model = make_model()
    before = statistics(model)
    with pytest.raises(ValueError, match="at least one"):
        recalibrate_batchnorm(model, [])
    assert_same(statistics(model), before)


def test_an_exception_keeps_the_old_statistics() -> None:
    model = make_model()
    before = statistics(model)
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, [make_batches()[0], torch.zeros(1)])
    assert_same(statistics(model), before)
    assert model[1].momentum == 0.1


def test_a_layer_that_saw_no_batch_keeps_its_statistics() -> None:
    model = make_model()
    before = statistics(model)
    with cumulative_batchnorm(model) as layers:
        model[:2].train()(make_batches()[0])
        assert [saw_batches(layer) for layer in layers] == [True, False]
    after = statistics(model)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert torch.equal(after["5.running_mean"], before["5.running_mean"])


# --- scores of a supernet's networks -------------------------------------------------------------------

WIDTHS = ({"0": 5, "4": 3}, {"0": 2, "4": 6}, {}, {"0": 1}, {"4": 1})


@functools.cache
def make_supernet(ranked: bool = True) -> Supernet:
    """In float64 and train mode, one layer in eval mode; never changed by a test that passes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 7, 3),
        nn.BatchNorm2d(7, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(7, 4, 3),
    ).double()
    model(3 + torch.randn(8, 3, 8, 8, dtype=torch.float64))
    groups = find_channel_groups(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    model.train()[1].eval()
    return Supernet(model, groups, None if ranked else prefix_order(groups))


def double_batches(count: int = 5) -> list[Tensor]:
    return [batch.double() for batch in make_batches(count)]


def output_sum(model: nn.Module) -> float:
    """A metric that hangs on every statistic, and that keeps the modes."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        value = float(model(images).abs().sum())
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return value


def everything(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[float | None]]:
    modes = [module.training for module in model.modules()]
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, modes, momenta


def assert_untouched(
    model: nn.Module, before: tuple[dict[str, Tensor], list[bool], list[float | None]]
) -> None:
    after = everything(model)
    assert_same(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("ranked", [True, False], ids=["l2_order", "prefix_order"])
def test_a_score_is_that_of_the_cut_and_recalibrated_network(ranked: bool, widths: dict[str, int]) -> None:
    supernet = make_supernet(ranked)
    before = everything(supernet.model)
    cut = shrink(supernet.model, supernet.groups, widths, supernet.order)
    stale = output_sum(cut)
    recalibrate_batchnorm(cut, double_batches())
    expected = output_sum(cut)
    found = score(supernet, widths, output_sum, double_batches())
    assert found == pytest.approx(expected, rel=1e-13)
    assert abs(stale - expected) > 1e-3 * expected
    assert_untouched(supernet.model, before)


def test_the_metric_sees_the_narrow_network_and_its_result_is_returned() -> None:
    supernet = make_supernet()

    def evaluate(model: nn.Module) -> float:
        assert model is supernet.model
        shapes = []
        handle = model[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        model(double_batches()[0])
        handle.remove()
        assert shapes == [(6, 2, 6, 6)]
        return 0.125

    before = everything(supernet.model)
    assert score(supernet, {"0": 2}, evaluate, double_batches()) == 0.125
    assert_untouched(supernet.model, before)


def fail(model: nn.Module) -> float:
    model(double_batches()[0])
    raise RuntimeError("no metric")


def train_and_leave(model: nn.Module) -> float:
    model.train()
    model(double_batches()[0])
    return 1.0


def evaluate_and_leave(model: nn.Module) -> float:
    model.eval()
    return 1.0


@pytest.mark.parametrize("evaluate", [train_and_leave, evaluate_and_leave])
def test_a_metric_may_leave_the_model_in_any_mode(evaluate: Callable[[nn.Module], float]) -> None:
    supernet = make_supernet()
    before = everything(supernet.model)
    try:
        score(supernet, WIDTHS[0], evaluate, double_batches())
        assert_untouched(supernet.model, before)
    finally:
        make_supernet.cache_clear()


def test_a_metric_that_fails_leaves_the_supernet_as_it_was() -> None:
    supernet = make_supernet()
    before = everything(supernet.model)
    with pytest.raises(RuntimeError, match="no metric"):
        score(supernet, WIDTHS[0], fail, double_batches())
    assert_untouched(supernet.model, before)


@pytest.mark.parametrize("batches", [[], [torch.zeros(1)]])
def test_batches_that_fail_leave_the_supernet_as_it_was(batches: list[Tensor]) -> None:
    supernet = make_supernet()
    before = everything(supernet.model)
    with pytest.raises((ValueError, RuntimeError)):
        score(supernet, WIDTHS[0], output_sum, batches)
    assert_untouched(supernet.model, before)


@pytest.mark.parametrize(("images", "expected"), [(1, 1), (6, 1), (7, 2), (12, 2), (29, 5), (10_000, 8)])
def test_batches_are_read_until_enough_images_were_seen(images: int, expected: int) -> None:
    read = 0

    def batches() -> Iterator[Tensor]:
        nonlocal read
        for batch in double_batches(8):
            read += 1
            yield batch

    supernet = make_supernet()
    found = score(supernet, WIDTHS[0], output_sum, batches(), images)
    assert read == expected
    assert found == score(supernet, WIDTHS[0], output_sum, double_batches(8)[:expected])


def test_the_order_of_the_batches_does_not_matter() -> None:
    supernet, batches = make_supernet(), double_batches()
    forward, backward = (score(supernet, WIDTHS[0], output_sum, b) for b in (batches, batches[::-1]))
    assert forward == pytest.approx(backward, rel=1e-13)


def test_scores_do_not_depend_on_those_taken_before() -> None:
    supernet, batches = make_supernet(), double_batches()
    scores = [score(supernet, widths, output_sum, batches) for widths in WIDTHS]
    again = [score(supernet, widths, output_sum, batches) for widths in WIDTHS[::-1]][::-1]
    assert scores == again and len(set(scores)) == len(scores)


@pytest.mark.slow
def test_disjoint_calibration_images_agree_within_a_point() -> None:
    """And narrow networks cannot be judged without them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, width in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    splits = digits()
    space = WidthSpace.from_model(model, torch.zeros(1, *splits.input_shape), min_ratio=0.25, divisor=1)
    supernet = Supernet(model, space.groups)
    generator = torch.Generator().manual_seed(0)
    step = SupernetStep(
        supernet, sandwich(space, generator), lambda b, m: nn.functional.cross_entropy(m(b[0]), b[1])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for epoch in range(12):
        for batch in loader(splits.train, 64, shuffle=True, seed=epoch, drop_last=True):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    held_out = ConcatDataset([splits.validation, splits.test])

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, held_out, device=torch.device("cpu"))

    images = torch.stack([image for image, _ in splits.train])
    for ratio in (1, 0.75, 0.5, 0.25):
        widths = space.uniform(ratio)
        scores = [score(supernet, widths, evaluate, half.split(64)) for half in images.chunk(2)]
        assert abs(scores[0] - scores[1]) < 1
        assert min(scores) > 90
    with supernet.at(widths):
        assert evaluate(model) < min(scores) - 5


def test_batch_statistics_normalise_each_batch_by_itself() -> None:
    model = make_model().eval()
    first, second = make_batches(2)
    with torch.no_grad():
        kept = model(first)
        use_batch_statistics(model)
        expected = first
        for layer in (model[0], model[1], model[2], model[4], model[5]):
            if isinstance(layer, nn.BatchNorm2d):
                mean = expected.mean((0, 2, 3), keepdim=True)
                variance = expected.var((0, 2, 3), keepdim=True, unbiased=False)
                normal = (expected - mean) / (variance + layer.eps).sqrt()
                expected = normal * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
            else:
                expected = layer(expected)
        found = model(first)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, kept)
        model.train()(second)  # leaves nothing behind
        model.eval()(second)
        assert torch.equal(model(first), found)
    assert not list(model.buffers())
    assert not saw_batches(model[1])


def test_batch_statistics_leave_other_layers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.5)).eval()
    images = make_batches(1)[0]
    expected = model(images)
    use_batch_statistics(model)
    assert torch.equal(model(images), expected)
