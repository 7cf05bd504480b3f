"""Hand-made networks, and slow but obvious versions of what the library does fast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_dbs import Budget, FlopsCost, ParamsCost, WidthSpace
from nni_dbs.cost import Bounds
from torch_pruning_adapters import ChannelGroup, find_channel_groups
from torch_pruning_adapters.calls import Inputs, call, tensors_in
from torch_pruning_adapters.group import Member

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Layers by name and a function that runs them: `forward(net, x)`."""

    def __init__(self, forward: Forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def conv(c_in: int, c_out: int, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    """A convolution that keeps the resolution."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **kwargs)


def head(net: Net, x: Tensor) -> Tensor:
    """Global average pooling and the layer `fc`."""
    return net.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def randomised(model: nn.Module) -> nn.Module:
    """In double precision and eval mode, with parameters and statistics that hide no mistake."""
    model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var") or tensor.dim() < 2:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif "running_mean" not in name:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn_like(tensor) / fan_in**0.5)
    return model


def random_widths(groups: Iterable[ChannelGroup], seed: int = 0) -> dict[str, int]:
    """Any width that each group can take, with equal chances."""
    rng = np.random.default_rng(seed)
    return {
        g.name: g.size if g.frozen else g.step * int(rng.integers(1, g.size // g.step + 1)) for g in groups
    }


def random_order(groups: Iterable[ChannelGroup], seed: int = 0) -> dict[str, list[int]]:
    """A random ranking of every group's channels, alike in every block of its grouped convolutions."""
    rng = np.random.default_rng(seed)
    order = {}
    for g in groups:
        period = g.size // g.step
        order[g.name] = [b * period + int(p) for p in rng.permutation(period) for b in range(g.step)]
    return order


def zeroed(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    widths: Mapping[str, int],
    order: Mapping[str, Sequence[int]],
) -> nn.Module:
    """The full network in which no consumer reads a dropped channel: what the cut network must equal."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        for g in groups:
            dropped = set(order[g.name][widths.get(g.name, g.size) :])
            for member in g.consumers:
                for entry, channel in entries(member):
                    if channel in dropped:
                        _zero_input(full.get_submodule(member.layer), member, entry)
    return full


def entries(member: Any) -> list[tuple[int, int]]:
    """(entry of the layer's axis, channel of the group) pairs."""
    return [
        (s.start + i * s.repeat + r, s.root + i)
        for s in member.spans
        for i in range(s.length)
        for r in range(s.repeat)
    ]


def _zero_input(layer: nn.Module, member: Member, entry: int) -> None:
    ((name, dim),) = member.tensors
    weight = getattr(layer, name)
    if not member.per_block:
        weight.select(dim, entry).zero_()
        return
    columns, rows = member.size // member.blocks, len(weight) // member.blocks
    block = entry // columns
    weight[block * rows : (block + 1) * rows, entry % columns] = 0


def mixes_channels(group: ChannelGroup) -> bool:
    """Whether a norm's statistics, or the scores of attention, run over the group's channels."""
    return any(m.kind in ("layernorm", "groupnorm", "statistics") for m in group.members)


def outputs(model: Callable[..., Any], x: Inputs) -> list[Tensor]:
    """All tensors that the model gives."""
    with torch.no_grad():
        return tensors_in(call(model, x))  # type: ignore[arg-type]


def assert_same_outputs(a: Callable[..., Any], b: Callable[..., Any], x: Inputs) -> None:
    """Up to rounding in double precision, and not because everything is zero."""
    for u, v in zip(outputs(a, x), outputs(b, x), strict=True):
        assert_close(u, v)


def assert_close(u: Tensor, v: Tensor) -> None:
    """Up to rounding in double precision, and not because everything is zero."""
    assert v.abs().max() > 1e-12
    torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-9 * float(v.abs().max()))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Case:
    """A network, the shape of its input, and the groups it must have: name -> (size, step)."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        groups: dict[str, tuple[int, int]],
        shape: tuple[int, ...] = (2, 3, 8, 8),
        exact: bool = True,
    ) -> None:
        self._build = build
        self.groups = groups
        self.shape = shape
        self.exact = exact  # False where a norm's statistics run over the channels

    def build(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return randomised(self._build()), torch.randn(self.shape, dtype=torch.float64)


def plain() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.bn(net.a(x)).relu()).relu())

    return Net(forward, a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 5, bias=False), fc=nn.Linear(5, 10))


def residual() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        return head(net, x + net.b(net.a(x).relu()))

    return Net(forward, stem=conv(3, 6), a=conv(6, 4), b=conv(4, 6), fc=nn.Linear(6, 10))


def concat() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.c(net.bn(torch.cat([net.a(x), net.b(x)], 1)).relu()))

    return Net(forward, a=conv(3, 4), b=conv(3, 6), bn=nn.BatchNorm2d(10), c=conv(10, 5), fc=nn.Linear(5, 10))


def flattened() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc2(net.fc1(net.a(x).relu().flatten(1)).relu())

    return Net(forward, a=conv(3, 4), fc1=nn.Linear(256, 6), fc2=nn.Linear(6, 10))


def depthwise() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.bn(net.dw(net.a(x).relu())).relu()))

    dw = conv(6, 6, groups=6)
    return Net(forward, a=conv(3, 6), dw=dw, bn=nn.BatchNorm2d(6), b=conv(6, 5), fc=nn.Linear(5, 10))


def grouped() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.g(net.a(x).relu()).relu())

    return Net(forward, a=conv(3, 16), g=conv(16, 12, groups=4), fc=nn.Linear(12, 10))


def squeeze_excite() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        scale = net.up(net.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return head(net, x * scale)

    return Net(forward, a=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), fc=nn.Linear(8, 10))


def chunk_and_add() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        u, v = net.a(x).relu().chunk(2, 1)
        return head(net, net.b(u + v))

    return Net(forward, a=conv(3, 8), b=conv(4, 5), fc=nn.Linear(5, 10))


def concat_then_add() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.d(net.c(x) + torch.cat([net.a(x), net.b(x)], 1)))

    return Net(forward, c=conv(3, 10), a=conv(3, 4), b=conv(3, 6), d=conv(10, 5), fc=nn.Linear(5, 10))


def shared() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.s(net.s(net.a(x)).relu()))

    return Net(forward, a=conv(3, 6), s=conv(6, 6), fc=nn.Linear(6, 10))


def prelu() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.one(net.each(net.a(x))))

    return Net(forward, a=conv(3, 6), each=nn.PReLU(6), one=nn.PReLU(), fc=nn.Linear(6, 10))


def group_norm(affine: bool = True) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.gn(net.a(x)).relu())

    return Net(forward, a=conv(3, 8), gn=nn.GroupNorm(2, 8, affine=affine), fc=nn.Linear(8, 10))


def layer_norm(affine: bool = True) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(net.ln(net.a(x)).relu())

    norm = nn.LayerNorm(6, elementwise_affine=affine)
    return Net(forward, a=nn.Linear(3, 6), ln=norm, fc=nn.Linear(6, 10))


def instance_norm(affine: bool) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.norm(net.a(x)).relu())

    return Net(forward, a=conv(3, 6), norm=nn.InstanceNorm2d(6, affine=affine), fc=nn.Linear(6, 10))


def layer_scale() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return head(net, x + net.gamma * net.a(x).relu())

    gamma = nn.Parameter(torch.ones(6, 1, 1))
    return Net(forward, stem=conv(3, 6), a=conv(6, 6), gamma=gamma, fc=nn.Linear(6, 10))


def transposed(groups: int = 1) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.up(net.a(x).relu()).relu()))

    up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)
    return Net(forward, a=conv(3, 8), up=up, b=conv(6, 5), fc=nn.Linear(5, 10))


def one_dimension() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(net.b(net.bn(net.a(x)).relu()).mean(2))

    return Net(
        forward,
        a=nn.Conv1d(3, 6, 3),
        bn=nn.BatchNorm1d(6),
        b=nn.Conv1d(6, 5, 3, stride=2),
        fc=nn.Linear(5, 10),
    )


def three_dimensions() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(net.b(net.bn(net.a(x)).relu()).mean((2, 3, 4)))

    return Net(forward, a=nn.Conv3d(3, 6, 3), bn=nn.BatchNorm3d(6), b=nn.Conv3d(6, 5, 2), fc=nn.Linear(5, 10))


CASES = {
    "plain": Case(plain, {"a": (6, 1), "b": (5, 1)}),
    "residual": Case(residual, {"stem": (6, 1), "a": (4, 1)}),
    "concat": Case(concat, {"a": (4, 1), "b": (6, 1), "c": (5, 1)}),
    "flattened": Case(flattened, {"a": (4, 1), "fc1": (6, 1)}),
    "depthwise": Case(depthwise, {"a": (6, 1), "b": (5, 1)}),
    "grouped": Case(grouped, {"a": (16, 4), "g": (12, 4)}),
    "squeeze_excite": Case(squeeze_excite, {"a": (8, 1), "down": (2, 1)}),
    "chunk_and_add": Case(chunk_and_add, {"a": (4, 1), "b": (5, 1)}),
    "concat_then_add": Case(concat_then_add, {"c[0:4]": (4, 1), "c[4:10]": (6, 1), "d": (5, 1)}),
    "shared": Case(shared, {"a": (6, 1)}),
    "prelu": Case(prelu, {"a": (6, 1)}),
    "layer_scale": Case(layer_scale, {"stem": (6, 1)}),
    "transposed": Case(transposed, {"a": (8, 1), "up": (6, 1), "b": (5, 1)}),
    "transposed_grouped": Case(lambda: transposed(2), {"a": (8, 2), "up": (6, 2), "b": (5, 1)}),
    "one_dimension": Case(one_dimension, {"a": (6, 1), "b": (5, 1)}, (2, 3, 16)),
    "three_dimensions": Case(three_dimensions, {"a": (6, 1), "b": (5, 1)}, (2, 3, 4, 4, 4)),
    "instance_norm": Case(lambda: instance_norm(True), {"a": (6, 1)}),
    "instance_norm_plain": Case(lambda: instance_norm(False), {"a": (6, 1)}),
    "group_norm": Case(group_norm, {"a": (8, 2)}, exact=False),
    "group_norm_plain": Case(lambda: group_norm(False), {"a": (8, 2)}, exact=False),
    "layer_norm": Case(layer_norm, {"a": (6, 1)}, (2, 5, 3), exact=False),
    "layer_norm_plain": Case(lambda: layer_norm(False), {"a": (6, 1)}, (2, 5, 3), exact=False),
}


@functools.cache
def chain(groups: int, width: int, divisor: int) -> tuple[WidthSpace, FlopsCost, ParamsCost]:
    """A chain of convolutions, each of which but the last is a group; its FLOPs and parameters."""
    convs = [conv(width if i else 3, width) for i in range(groups + 1)]
    model = nn.Sequential(*(layer for c in convs for layer in (c, nn.ReLU())))
    x = torch.zeros(1, 3, 8, 8)
    found = find_channel_groups(model, x, verify=False)
    space = WidthSpace(found, min_ratio=0.1, divisor=divisor)
    return space, FlopsCost(model, x, found), ParamsCost(model, found)


def bound(share: float, cost: FlopsCost) -> Bounds:
    return Budget.parse(share).bound({"flops": cost})


def truth(space: WidthSpace, widths: Tensor, seed: int = 0) -> Tensor:
    """Scores (N,): sum_l w_l log r_l - sum_l v_l (r_l - r_{l+1})^2, w ~ U(0.5, 1.5), v ~ U(0, 2)."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.5 + torch.rand(len(space.names), generator=generator, dtype=torch.float64)
    v = 2 * torch.rand(len(space.names), generator=generator, dtype=torch.float64)
    r = widths / space.encode({})
    return (w * r.log()).sum(1) - (v[:-1] * (r[:, :-1] - r[:, 1:]) ** 2).sum(1)
