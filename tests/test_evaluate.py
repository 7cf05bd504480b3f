from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nni_dbs.evaluate import cumulative_batchnorm, recalibrate_batchnorm, saw_batches


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
