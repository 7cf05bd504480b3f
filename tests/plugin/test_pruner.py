from __future__ import annotations

import copy
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
import torchvision
import yaml
from nni.compression import TorchEvaluator
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, TensorDataset

from nni_dbs import RandomPruner, UniformPruner, load_pruned
from nni_dbs.cost import count_flops
from nni_dbs.errors import BudgetError, ConfigError, EvaluatorError, ResultError
from torch_pruning_adapters import ChannelGroup, UnsupportedModelError, l2_norm
from torch_pruning_adapters.calls import call

IMAGE = torch.zeros(1, 3, 16, 16)
CONVS = [{"op_types": ["Conv2d"]}]
STEPS_PER_EPOCH = 4


class Net(nn.Module):
    """Two groups: `stem.0` with its residual partner `block.6`, and `block.0` with a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1),
            nn.BatchNorm2d(16),
        )
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(8, 3, 16, 16, generator=generator), torch.randint(3, (8,), generator=generator)
    )


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> list[float]:
    losses = []
    images, labels = make_data().tensors
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def make_evaluator(
    model: nn.Module, evaluating_func: Any = None, dummy_input: Any = None, batch_size: int = 2
) -> TorchEvaluator:
    def training_step(batch: Any, model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def training_func(
        model: nn.Module,
        optimizer: Any,
        training_step: Any,
        lr_scheduler: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        model.train()
        batches = 10 * list(DataLoader(make_data(), batch_size=batch_size))
        for _, batch in zip(range(max_steps or STEPS_PER_EPOCH), batches, strict=False):
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    return TorchEvaluator(
        training_func, optimizer, training_step, dummy_input=dummy_input, evaluating_func=evaluating_func
    )


def uniform(model: nn.Module | None = None, config_list: Any = CONVS, **options: Any) -> UniformPruner:
    options = {"budget": 0.5, "example_inputs": IMAGE, "divisor": 1, **options}
    return UniformPruner(model or make_net(), config_list, **options)


def least_first(model: nn.Module, group: ChannelGroup) -> Tensor:
    return -l2_norm(model, group)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class TestDropIn:
    @pytest.mark.filterwarnings("ignore:no example_inputs")
    @pytest.mark.parametrize("pruner_class", [L1NormPruner, UniformPruner])
    def test_script_with_only_the_class_changed(self, pruner_class: Any) -> None:
        model = make_net()
        full = parameter_count(model)
        config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        pruner = pruner_class(model, config_list)
        compressed, masks = pruner.compress()
        assert compressed is model
        for layer in ("stem.0", "block.0", "block.3", "block.6"):
            weight = model.get_submodule(layer)._nni_wrapper.weight
            assert masks[layer]["weight"].shape == weight.shape
            assert set(masks[layer]["weight"].unique().tolist()) == {0, 1}
        assert masks["stem.0"]["bias"] is None
        assert masks["block.0"]["bias"].shape == (24,)

        pruner.unwrap_model()
        graph = torch.fx.symbolic_trace(model)
        ModelSpeedup(model, torch.rand(2, 3, 16, 16), masks, graph_module=graph).speedup_model()
        assert parameter_count(model) < 0.7 * full
        losses = train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=10)
        assert losses[-1] < losses[0]

    def test_export_and_reload(self, tmp_path: Path) -> None:
        pruner = uniform(seed=7)
        pruner.compress()
        small = pruner.export(tmp_path / "new" / "out", source={"model": "my.package:make"})
        fresh = Net().eval()
        untouched = state_of(fresh)
        loaded = load_pruned(tmp_path / "new" / "out", fresh)
        images = make_data().tensors[0]
        assert torch.equal(loaded(images), small(images))
        assert_same(state_of(fresh), untouched)
        assert not any(
            "forward" in vars(module) or hasattr(module, "_nni_wrapper") for module in small.modules()
        )

    def test_files(self, tmp_path: Path) -> None:
        pruner = uniform(seed=7, importance=least_first)
        pruner.compress()
        small = pruner.export(tmp_path, source={"model": "my.package:make", "arguments": {"depth": 2}})
        assert {path.name for path in tmp_path.iterdir()} == {
            "widths.yaml",
            "groups.json",
            "weights.safetensors",
            "result.json",
        }

        result = json.loads((tmp_path / "result.json").read_text())
        assert result["method"] == "uniform"
        assert result["seed"] == 7
        assert result["budget"] == "flops <= 0.5 of the full network"
        assert result["widths"] == dict(pruner.widths)
        assert result["flops"] == count_flops(small, IMAGE) <= 0.5 * result["full_flops"]
        assert result["full_flops"] == count_flops(make_net(), IMAGE)
        assert result["params"] == parameter_count(small)
        assert result["full_params"] == parameter_count(make_net())
        assert result["evaluations"] == 0
        assert result["seconds"]["search"] > 0
        assert result["device"] == "cpu"
        assert result["versions"]["torch"] == version("torch")

        chosen = yaml.safe_load((tmp_path / "widths.yaml").read_text())
        widths = dict(pruner.widths)
        assert chosen == {"model": "my.package:make", "arguments": {"depth": 2}, "widths": widths}
        described = json.loads((tmp_path / "groups.json").read_text())
        assert [g["name"] for g in described["groups"]] == list(widths) == list(described["order"])
        kept = np.sort(described["order"]["block.0"][: widths["block.0"]])
        assert torch.equal(small.block[3].weight, make_net().block[3].weight[torch.from_numpy(kept)])
        assert_same(load_file(tmp_path / "weights.safetensors"), state_of(small))


class TestConfigList:
    @pytest.mark.parametrize(
        ("config_list", "prunable"),
        [
            (CONVS, {"stem.0", "block.0"}),
            ([{"op_names": ["block.0"]}], {"block.0"}),
            ([{"op_names": ["block.0", "block.6"]}], {"block.0"}),
            ([{"op_names": ["block.6"]}, {"op_names": ["stem.0"]}], {"stem.0"}),
            ([{"op_names_re": [r"block\.[06]"]}], {"block.0"}),
            ([{"op_names_re": ["stem.*", r"block\.6"], "op_types": ["Conv2d"]}], {"stem.0"}),
            ([{"op_types": ["Conv2d"], "exclude_op_names": ["block.6"]}], {"block.0"}),
            ([{"op_types": ["Conv2d"], "exclude_op_names_re": ["stem.*"]}], {"block.0"}),
            ([{"op_types": ["Conv2d", "BatchNorm2d"], "exclude_op_types": ["Conv2d"]}], set()),
            ([{"op_types": ["Linear"]}], set()),
            ([{"op_types": ["Conv2d"], "sparsity": 0.5}], {"stem.0", "block.0"}),
            ([{"op_types": ["Conv2d"], "sparsity_per_layer": 0.5}], {"stem.0", "block.0"}),
            (
                [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"exclude": True, "op_names": ["stem.0"]}],
                {"block.0"},
            ),
            ([{"op_types": ["Conv2d"], "sparsity": 0.5, "op_partial_names": ["block"]}], {"block.0"}),
        ],
    )
    def test_prunable_groups(self, config_list: list[dict], prunable: set[str]) -> None:
        given = copy.deepcopy(config_list)
        pruner = uniform(config_list=config_list, budget=1.0)
        assert {g.name for g in pruner.space.groups if g.frozen is None} == prunable
        assert config_list == given
        for g in pruner.space.groups:
            assert g.name in prunable or g.frozen.startswith("config_list does not select")

    @pytest.mark.parametrize(
        "setting",
        [
            {"sparse_threshold": 0.5},
            {"granularity": "out_channel"},
            {"global_group_id": 0},
            {"dependency_group_id": 0},
            {"internal_metric_block": 4},
            {"apply_method": "mul"},
            {"align": {"module_name": None, "target_name": "weight", "dims": [0]}},
            {"target_names": ["weight"]},
            {"target_settings": {"weight": {"sparse_ratio": 0.5}}},
            {"total_sparsity": 0.5},
            {"quant_types": ["weight"], "quant_bits": 8},
            {"sparce_ratio": 0.5},
        ],
        ids=lambda setting: next(iter(setting)),
    )
    def test_keys_without_a_meaning(self, setting: dict) -> None:
        with pytest.raises(ConfigError, match=r"has no meaning for whole channel groups.*it takes op_types"):
            uniform(config_list=[{"op_types": ["Conv2d"], **setting}])

    @pytest.mark.parametrize(
        ("config_list", "message"),
        [
            ([], "config_list is empty"),
            ([{"op_types": ["Conv3d"]}], "selects no layer"),
            ([{"op_types": ["Conv2d"], "exclude_op_types": ["Conv2d"]}], "selects no layer"),
            ([{"op_names": ["stem.00"]}], "no layer 'stem.00' .did you mean 'stem.0'"),
            ([{"op_names_re": ["stem.*"]}], "'stem.*' is a .*no channels to prune"),
            ([{"op_types": ["Conv2d"], "sparce_ratio": 0.5}], "did you mean 'sparse_ratio'"),
            ([{"op_types": ["Conv2d"], "sparse_ratio": 1.5}], r"sparse_ratio must lie in \[0, 1\]"),
            ([{"op_types": ["Conv2d"], "sparse_ratio": "half"}], r"sparse_ratio must lie in \[0, 1\]"),
            ([{"op_types": ["Conv2d"], "min_sparse_ratio": 1.0}], "config_list: .*min_sparse_ratio"),
            ([{"op_types": "Conv2d"}], "config_list"),
        ],
    )
    def test_mistakes_leave_the_model_as_it_was(self, config_list: list[dict], message: str) -> None:
        model = make_net()
        before = state_of(model)
        with pytest.raises(ConfigError, match=message) as caught:
            uniform(model, config_list)
        assert "\n" not in str(caught.value)
        assert_same(state_of(model), before)

    def test_bounds_of_producers_intersect(self) -> None:
        config_list = [
            {"op_names": ["stem.0"], "min_sparse_ratio": 0.25},
            {"op_names": ["block.6"], "max_sparse_ratio": 0.5},
            {"op_names": ["block.0"]},
        ]
        pruner = uniform(config_list=config_list, budget=0.4)
        assert pruner.space.choices("stem.0") == (8, 9, 10, 11, 12)
        assert pruner.space.choices("block.0") == tuple(range(3, 25))
        pruner.compress()
        assert 8 <= pruner.widths["stem.0"] <= 12

    def test_bounds_without_a_choice(self) -> None:
        config_list = [
            {"op_names": ["stem.0"], "min_sparse_ratio": 0.5},
            {"op_names": ["block.6"], "max_sparse_ratio": 0.25},
        ]
        with pytest.raises(ConfigError, match=r"leave no choice: group 'stem.0'.*between 75% and 50%"):
            uniform(config_list=config_list)

    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.625, 0.75])
    def test_sparse_ratio_is_the_budget_of_the_uniform_network(self, ratio: float) -> None:
        pruner = uniform(config_list=[{"op_types": ["Conv2d"], "sparse_ratio": ratio}], budget=None)
        wished = pruner.space.uniform(1 - ratio)
        assert pruner.bounds.limits[0][2] == pruner.costs["flops"](wished)
        pruner.compress()
        assert dict(pruner.widths) == dict(wished)

    def test_different_ratios(self) -> None:
        config_list = [
            {"op_names": ["stem.0"], "sparse_ratio": 0.5},
            {"op_names": ["block.6"], "sparse_ratio": 0.25},
            {"op_names": ["block.0"], "sparse_ratio": 0.75},
        ]
        pruner = uniform(config_list=config_list, budget=None)
        assert pruner.bounds.limits[0][2] == pruner.costs["flops"]({"stem.0": 12, "block.0": 6})

    def test_budget_takes_the_place_of_sparse_ratio(self) -> None:
        pruner = uniform(config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.9}], budget=0.8)
        pruner.compress()
        assert 0.75 < pruner.result.flops / pruner.result.full_flops <= 0.8

    def test_neither_budget_nor_ratio(self) -> None:
        with pytest.raises(BudgetError, match="no budget: give budget="):
            uniform(budget=None)


class TestExampleInputs:
    def test_given(self) -> None:
        pruner = uniform(example_inputs=torch.zeros(5, 3, 32, 32))
        assert pruner.costs["flops"].full == count_flops(make_net(), torch.zeros(1, 3, 32, 32))

    def test_of_the_evaluator(self) -> None:
        model = make_net()
        evaluator = make_evaluator(model, dummy_input=torch.zeros(4, 3, 16, 16))
        pruner = uniform(model, evaluator=evaluator, example_inputs=None, budget="40K")
        assert pruner.costs["flops"].full == count_flops(make_net(), IMAGE)

    def test_guessed(self) -> None:
        with pytest.warns(UserWarning, match="guessing one image of 3x224x224"):
            pruner = uniform(example_inputs=None)
        assert pruner.costs["flops"].full == count_flops(make_net(), torch.zeros(1, 3, 224, 224))
        pruner.compress()
        assert pruner.result.flops <= 0.5 * pruner.result.full_flops

    @pytest.mark.parametrize("budget", ["100K", {"flops": 0.5, "params": "1K"}])
    def test_an_absolute_budget_needs_the_size(self, budget: Any) -> None:
        with pytest.raises(BudgetError, match="give example_inputs=, or dummy_input"):
            uniform(example_inputs=None, budget=budget)


def healthy(model: nn.Module, images: Tensor) -> nn.Module:
    """Random norms and biases, but such that the input still decides the output."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(tensor.shape, generator=generator)

    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.add_(noise(bias, 0.1))
            if module in norms and module.affine:
                module.weight.add_(noise(module.weight, 0.2))
            if module in norms and module.running_mean is not None:
                module.momentum = 1.0
        model.train()(images)
        for norm in norms:
            if norm.running_mean is not None:
                norm.running_mean.add_(noise(norm.running_mean, 0.2) * norm.running_var.sqrt())
                norm.running_var.mul_(1 + noise(norm.running_var, 0.2).abs())
    return model.eval()


def masked_against_exported(model: nn.Module, images: Tensor, budget: float = 0.5) -> float:
    """Largest difference of the masked and the exported model's outputs, relative to their spread."""
    pruner = UniformPruner(
        healthy(model, images), [{"op_types": ["Conv2d", "Linear"]}], budget=budget, example_inputs=images
    )
    masked, _ = pruner.compress()
    with torch.no_grad():
        a, b = call(masked, images), call(pruner.export(), images)
    spread = (b - b.mean(0)).abs().max()
    assert spread > 1e-4 * b.abs().max()
    return float((a - b).abs().max() / b.abs().max())


def small_net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), *layers, nn.Conv2d(32, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class TestMasks:
    @pytest.mark.parametrize(
        "name",
        [
            "resnet18",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "densenet121",
            "regnet_y_400mf",
            "resnext50_32x4d",
            "squeezenet1_1",
            "efficientnet_b0",
            "googlenet",
        ],
    )
    def test_masked_model_equals_the_exported_one(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = torchvision.models.get_model(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert masked_against_exported(model, torch.randn(4, 3, 64, 64)) < 1e-5

    @pytest.mark.parametrize(
        "layers",
        [
            [nn.ReLU()],
            [nn.PReLU(32)],
            [nn.BatchNorm2d(32), nn.SiLU(), nn.Dropout2d(0.5)],
            [nn.SyncBatchNorm(32), nn.ReLU()],
            [nn.InstanceNorm2d(32, affine=True), nn.ReLU()],
            [nn.Conv2d(32, 32, 3, groups=32), nn.Hardswish()],
        ],
        ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
    )
    def test_layers_that_masks_reach(self, layers: list[nn.Module]) -> None:
        assert masked_against_exported(small_net(*layers), torch.randn(4, 3, 16, 16)) < 1e-5

    @pytest.mark.parametrize(
        "layers",
        [
            [nn.Sigmoid()],
            [nn.BatchNorm2d(32, affine=False)],
            [nn.GroupNorm(1, 32), nn.ReLU()],
        ],
        ids=lambda layers: type(layers[0]).__name__,
    )
    def test_layers_that_masks_do_not_reach(self, layers: list[nn.Module]) -> None:
        """A masked channel is a constant other than 0 there, or enters the other channels' statistics."""
        assert masked_against_exported(small_net(*layers), torch.randn(4, 3, 16, 16)) > 1e-3

    @pytest.mark.parametrize(
        ("hidden_only", "low", "high"), [(True, 0.0, 1e-5), (False, 1e-2, 10.0)], ids=["hidden", "all"]
    )
    def test_layernorm(self, hidden_only: bool, low: float, high: float) -> None:
        """ConvNeXt's LayerNorms see the masked channels of the residual stream, not the hidden ones."""
        model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.0, layer_scale=0.5)
        config = (
            {"op_names_re": [r"features.*block\.3"]} if hidden_only else {"op_types": ["Conv2d", "Linear"]}
        )
        images = torch.randn(2, 3, 32, 32)
        pruner = UniformPruner(healthy(model, images), [config], budget=0.8, example_inputs=images)
        masked, _ = pruner.compress()
        with torch.no_grad():
            a, b = masked(images), pruner.export()(images)
        assert low <= (a - b).abs().max() / b.abs().max() < high

    def test_masks_drop_whole_groups(self) -> None:
        pruner = uniform()
        _, masks = pruner.compress()
        dropped = {
            layer: (tensors["weight"].flatten(1).sum(1) if tensors["weight"].dim() > 1 else tensors["weight"])
            == 0
            for layer, tensors in masks.items()
        }
        for group in (
            ("stem.0", "stem.1", "block.6", "block.7"),
            ("block.0", "block.1", "block.3", "block.4"),
        ):
            assert dropped[group[0]].sum() == len(dropped[group[0]]) - pruner.widths[group[0]] > 0
            assert all(torch.equal(dropped[layer], dropped[group[0]]) for layer in group)
        for tensors in masks.values():
            assert tensors["bias"] is None or torch.equal(
                tensors["bias"] == 0, tensors["weight"].reshape(len(tensors["bias"]), -1)[:, 0] == 0
            )

    def test_layers_between_need_not_be_selected(self) -> None:
        images = make_data().tensors[0]
        pruner = uniform(
            healthy(make_net(), images),
            [{"op_names": ["stem.0", "block.0", "block.6"]}],
            example_inputs=images,
        )
        masked, masks = pruner.compress()
        assert (masks["block.3"]["bias"] == 0).any()
        torch.testing.assert_close(pruner.export()(images), masked(images))

    def test_selected_layers_without_a_group_stay_whole(self) -> None:
        _, masks = uniform(config_list=[{"op_types": ["Conv2d", "Linear"]}]).compress()
        assert masks["fc"]["weight"].all() and masks["fc"]["bias"].all()


class TestLifeCycle:
    def test_weights_stay_as_they_were(self) -> None:
        model = make_net().train()
        before = state_of(model)
        pruner = uniform(model)
        pruner.compress()
        pruner.export()
        assert all(module.training for module in model.modules())
        pruner.unwrap_model()
        assert_same(state_of(model), before)

    def test_optimizer_made_before_export_goes_on_training(self) -> None:
        model = make_net()
        pruner = uniform(model)
        pruner.compress()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = state_of(pruner.export())
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        train(model, optimizer)
        second = state_of(pruner.export())
        assert not any(torch.equal(first[name], second[name]) for name in ("stem.0.weight", "fc.weight"))

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_export_keeps_the_model_as_it_finds_it(self, wrapped: bool) -> None:
        model = make_net()
        pruner = uniform(model)
        pruner.compress()
        images = make_data().tensors[0]
        expected = model(images)
        if not wrapped:
            pruner.unwrap_model()
        small = pruner.export()
        torch.testing.assert_close(small(images), expected)
        assert hasattr(model.stem[0], "_nni_wrapper") == wrapped

    def test_trained_weights_of_an_unwrapped_model_are_exported(self) -> None:
        model = make_net()
        pruner = uniform(model)
        pruner.compress()
        pruner.unwrap_model()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert torch.equal(pruner.export().fc.bias, model.fc.bias)
        assert not torch.equal(model.fc.bias, make_net().fc.bias)

    def test_own_forward_of_a_layer_is_kept(self) -> None:
        model = make_net()
        model.fc.forward = lambda x: functional.linear(x, model.fc.weight) * 0 + 7
        pruner = uniform(model)
        pruner.compress()
        assert (pruner.export()(IMAGE) == 7).all()

    def test_frozen_parameters_stay_frozen(self) -> None:
        model = make_net()
        model.stem[0].weight.requires_grad_(False)
        pruner = uniform(model)
        pruner.compress()
        assert not pruner.export().stem[0].weight.requires_grad
        pruner.unwrap_model()
        assert not model.stem[0].weight.requires_grad

    def test_compress_again(self) -> None:
        pruner = uniform()
        _, first = pruner.compress()
        _, second = pruner.compress()
        assert all(torch.equal(first[layer]["weight"], second[layer]["weight"]) for layer in first)

    def test_before_compress(self, tmp_path: Path) -> None:
        pruner = uniform()
        with pytest.raises(ConfigError, match=r"call compress\(\) first"):
            pruner.export(tmp_path)
        with pytest.raises(ConfigError, match=r"call compress\(\) first"):
            _ = pruner.widths
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("duration", [{"max_steps": 1}, {"max_epochs": 1}])
    def test_durations_are_refused(self, duration: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match="UniformPruner trains nothing"):
            uniform().compress(**duration)

    def test_wrapped_model_is_refused(self) -> None:
        model = make_net()
        first = uniform(model)
        with pytest.raises(ConfigError, match=r"unwrap_model\(\) first"):
            uniform(model)
        first.unwrap_model()
        uniform(model).compress()

    def test_from_another_compressor(self) -> None:
        model = make_net()
        first = L1NormPruner(model, [{"op_names": ["block.0"], "sparse_ratio": 0.5}])
        evaluator = make_evaluator(model, dummy_input=IMAGE)
        second = UniformPruner.from_compressor(first, CONVS, evaluator=evaluator, budget=0.5, divisor=1)
        before = model.fc.weight.detach().clone()
        with pytest.raises(ConfigError, match="max_steps or max_epochs"):
            second.compress()
        compressed, masks = second.compress(max_steps=STEPS_PER_EPOCH)
        assert compressed is model
        assert (masks["stem.0"]["weight"] == 0).any()
        assert second.result.flops <= 0.5 * second.result.full_flops
        small = second.export()
        images = make_data().tensors[0]
        torch.testing.assert_close(small.eval()(images), model.eval()(images))
        assert parameter_count(small) == second.result.params
        assert not torch.equal(model.fc.weight, before)
        assert evaluator.model is None

    @pytest.mark.parametrize("compressed", [True, False])
    def test_takes_the_place_of_an_earlier_pruner(self, compressed: bool) -> None:
        model = make_net()
        first = uniform(model)
        if compressed:
            first.compress()
        second = UniformPruner.from_compressor(
            first, [{"op_names": ["block.0"]}], budget=0.8, example_inputs=IMAGE
        )
        second.compress()
        small = second.export()
        assert small.stem[0].out_channels == 16
        images = make_data().tensors[0]
        torch.testing.assert_close(small(images), model(images))

    def test_joined_later_it_keeps_its_choice(self) -> None:
        model = make_net()
        first = uniform(model)
        _, masks = first.compress()
        first.importance = least_first
        second = L1NormPruner.from_compressor(
            first, [{"op_names": ["fc"], "sparse_ratio": 0.3}], evaluator=make_evaluator(model)
        )
        _, joined = second.compress(max_steps=STEPS_PER_EPOCH, max_epochs=None)
        assert all(torch.equal(joined[layer]["weight"], masks[layer]["weight"]) for layer in masks)
        assert parameter_count(first.export()) == first.result.params

    @pytest.mark.parametrize("budget", ["1K", {"params": 0.01}])
    def test_impossible_budget(self, budget: Any) -> None:
        model = make_net()
        with pytest.raises(BudgetError, match=r"below the smallest network.*reachable are .* to "):
            uniform(model, budget=budget)
        assert not hasattr(model.stem[0], "_nni_wrapper")

    def test_unsupported_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="the model does not run: RuntimeError"):
            uniform(example_inputs=torch.zeros(1, 5, 32, 32))

    def test_a_transformer(self, tmp_path: Path) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()
        torch.nn.init.normal_(model.heads.head.weight)
        fresh, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
        pruner = uniform(model, [{"op_types": ["Linear", "Conv2d"]}], budget=0.5, example_inputs=images[:1])
        pruner.compress()
        small = pruner.export(tmp_path / "out")
        assert pruner.flops(pruner.widths) <= pruner.flops.full / 2
        assert small.hidden_dim == small.encoder.layers[0].self_attention.embed_dim < 32
        assert torch.equal(load_pruned(tmp_path / "out", fresh)(images), small(images))

    def test_unwritable_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        pruner = uniform()
        pruner.compress()
        with pytest.raises(ResultError, match="cannot write"):
            pruner.export(tmp_path / "file" / "out")


class TestExportedModel:
    @pytest.fixture
    def small(self) -> nn.Module:
        pruner = uniform()
        pruner.compress()
        return pruner.export()

    def test_fine_tunes(self, small: nn.Module) -> None:
        losses = train(small, torch.optim.SGD(small.parameters(), lr=0.1), steps=20)
        assert losses[-1] < 0.8 * losses[0]

    def test_deep_copy_is_independent(self, small: nn.Module) -> None:
        images = make_data().tensors[0]
        expected = small(images)
        copied = copy.deepcopy(small)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
        assert torch.equal(copied(images), expected)

    def test_torch_export(self, small: nn.Module) -> None:
        images = make_data().tensors[0]
        program = torch.export.export(small, (images,))
        torch.testing.assert_close(program.module()(images), small(images))

    @pytest.mark.filterwarnings("ignore")
    def test_onnx(self, small: nn.Module, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        path = tmp_path / "small.onnx"
        images = make_data().tensors[0]
        torch.onnx.export(small, (images,), str(path), dynamo=True)
        session = reference.ReferenceEvaluator(onnx.load(str(path)))
        (found,) = session.run(None, {session.input_names[0]: images.numpy()})
        np.testing.assert_allclose(found, small(images).detach().numpy(), atol=1e-5)


class TestRandom:
    @staticmethod
    def pruner(evaluating_func: Any, **options: Any) -> RandomPruner:
        model = make_net()
        evaluator = make_evaluator(model, evaluating_func, IMAGE)
        options = {
            "budget": 0.5,
            "divisor": 1,
            "candidates": 6,
            "calibration_steps": 3,
            "quiet": True,
            **options,
        }
        return RandomPruner(model, CONVS, evaluator, **options)

    def test_best_of_the_drawn(self) -> None:
        scored: list[Any] = []
        pruner = self.pruner(lambda model: scored.append(model) or float(model.fc.in_features))
        before = vars(pruner.evaluator).copy()
        pruner.compress()
        assert 4 <= len(scored) == pruner.result.evaluations <= 6
        assert pruner.widths["stem.0"] == max(model.fc.in_features for model in scored)
        assert len({model.fc.in_features for model in scored}) > 1
        for model in scored:
            assert count_flops(model, IMAGE) <= 0.5 * pruner.result.full_flops
            assert not hasattr(model.stem[0], "_nni_wrapper")
            assert model.stem[1].num_batches_tracked == 3
        assert vars(pruner.evaluator) == before
        assert pruner.bound_model.stem[1].num_batches_tracked == 0

    def test_calibration_can_be_left_out(self) -> None:
        scored: list[Any] = []
        self.pruner(lambda model: scored.append(model) or 0.0, calibration_steps=0).compress()
        assert all(model.stem[1].num_batches_tracked == 0 for model in scored)

    def test_seed(self) -> None:
        def drawn(seed: int) -> list[tuple[int, int]]:
            seen: list[tuple[int, int]] = []

            def note(model: Any) -> float:
                seen.append((model.fc.in_features, model.block[0].out_channels))
                return model(make_data().tensors[0])[:, 0].mean().item()

            pruner = self.pruner(note, seed=seed)
            pruner.compress()
            return [*seen, tuple(pruner.widths.values())]

        assert drawn(1) == drawn(1) != drawn(2)

    def test_weights_stay_as_they_were(self) -> None:
        pruner = self.pruner(lambda model: 0.0)
        pruner.compress()
        pruner.unwrap_model()
        assert_same(state_of(pruner.bound_model), state_of(make_net()))

    @pytest.mark.parametrize(
        ("evaluating_func", "message"), [(lambda _: float("nan"), "NaN"), (None, "evaluating_func")]
    )
    def test_no_score(self, evaluating_func: Any, message: str) -> None:
        pruner = self.pruner(evaluating_func)
        with pytest.raises(EvaluatorError, match=message):
            pruner.compress()
        assert pruner.evaluator.model is None
        assert hasattr(pruner.bound_model.stem[0], "_nni_wrapper")
        with pytest.raises(ConfigError, match=r"call compress\(\) first"):
            pruner.export()

    def test_candidates(self) -> None:
        with pytest.raises(ConfigError, match="candidates must be at least 1"):
            self.pruner(lambda model: 0.0, candidates=0)


def assert_works(pruner: Any, fresh: nn.Module, inputs: Any, directory: Path) -> None:
    """compress, export, reload, for pruners with any evaluator."""
    pruner.compress()
    assert 0 < pruner.result.flops <= 0.5 * pruner.result.full_flops
    assert pruner.evaluator.model is None
    small = pruner.export(directory).eval()
    loaded = load_pruned(directory, fresh.eval())
    with torch.no_grad():
        for a, b in zip(_outputs(small, inputs), _outputs(loaded, inputs), strict=True):
            assert torch.equal(a, b)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    out = call(model, inputs)
    return [out] if isinstance(out, Tensor) else [out.logits]


@pytest.mark.parametrize(
    ("pruner_class", "options", "evaluations"),
    [
        (UniformPruner, {}, 0),
        (RandomPruner, {"candidates": 4, "calibration_steps": 2, "divisor": 2, "quiet": True}, 4),
    ],
)
class TestOtherEvaluators:
    def test_lightning(
        self, tmp_path: Path, pruner_class: Any, options: dict[str, Any], evaluations: int
    ) -> None:
        pl = pytest.importorskip("pytorch_lightning")
        from nni.compression import LightningEvaluator

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return functional.cross_entropy(self(batch[0]), batch[1])

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log("default", (self(batch[0]).argmax(1) == batch[1]).float().mean())

            def configure_optimizers(self) -> Any:
                return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1)

        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(make_data(), batch_size=2)

            def test_dataloader(self) -> DataLoader[Any]:
                return DataLoader(make_data(), batch_size=4)

        trainer = nni.trace(pl.Trainer)(
            default_root_dir=str(tmp_path),
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        evaluator = LightningEvaluator(trainer, nni.trace(Data)(), dummy_input=torch.zeros(2, 3, 16, 16))
        pruner = pruner_class(Module(), CONVS, evaluator, budget=0.5, **options)
        assert pruner.costs["flops"].full == count_flops(make_net(), IMAGE)
        assert_works(pruner, Module(), make_data().tensors[0], tmp_path / "out")
        assert (evaluations > 0) <= pruner.result.evaluations <= evaluations

    def test_transformers(
        self, tmp_path: Path, pruner_class: Any, options: dict[str, Any], evaluations: int
    ) -> None:
        pytest.importorskip("accelerate")
        hf = pytest.importorskip("transformers")
        from nni.compression import TransformersEvaluator

        def make() -> Any:
            config = hf.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3
            )
            return hf.ResNetForImageClassification(config)

        data = [{"pixel_values": image, "labels": label} for image, label in make_data()]
        model = make()
        trainer = nni.trace(hf.Trainer)(
            model=model,
            args=hf.TrainingArguments(
                output_dir=str(tmp_path / "trainer"),
                per_device_train_batch_size=2,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda found: {
                "default": float((found.predictions.argmax(1) == found.label_ids).mean())
            },
        )
        inputs = {"pixel_values": make_data().tensors[0]}
        evaluator = TransformersEvaluator(trainer, dummy_input=inputs)
        pruner = pruner_class(model, CONVS, evaluator, budget=0.5, **options)
        assert_works(pruner, make(), inputs, tmp_path / "out")
        assert (evaluations > 0) <= pruner.result.evaluations <= evaluations
