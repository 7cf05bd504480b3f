"""What a network costs, as an exact function of its widths; and budgets.

FLOPs here are multiply-adds of convolutions, linear layers and matrix products: fvcore's count with its
handles of normalisation, pooling, upsampling and grid sampling switched off. It is the convention of the
papers and of torchvision's published `_ops` (ResNet-18 1.814 G, MobileNetV2 0.3008 G, ResNet-50 4.089 G).

A layer's count is its weight's number of elements times the positions at which it is applied, and a
weight's number of elements is a product of (at most two) linear functions of the widths. One analysis at
full width gives the positions; the sum over all layers is a quadratic form in the widths. In units of each
group's step its coefficients are integers, so float64 arithmetic on it is exact below 2**53.

A residual block whose groups have width 0 is removed, and none of its layers costs anything: not their
biases, and not the depthwise convolutions of the residual stream inside of it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_dbs.errors import BudgetError
from torch_pruning_adapters import (
    ChannelGroup,
    UnsupportedModelError,
    WidthError,
    check_widths,
    removed_blocks,
    shrink,
)
from torch_pruning_adapters.calls import Inputs, preserved, unfused_attention
from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.group import Member, Product, lies_in

NOT_COUNTED = (
    "aten::batch_norm",
    "aten::group_norm",
    "aten::layer_norm",
    "aten::instance_norm",
    "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d",
    "aten::adaptive_avg_pool3d",
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
    "aten::grid_sampler",
)


_CHUNK = 1024  # width vectors whose intermediate results stay in a core's cache


class Cost(Protocol):
    """What a budget can bound: `__call__` for one network, `batch` for many.

    It never falls when a width grows; FLOPs and parameters are whole numbers, latencies are not.
    """

    @property
    def full(self) -> float: ...

    def __call__(self, widths: Mapping[str, int]) -> float: ...

    def batch(self, widths: Tensor) -> Tensor: ...


@runtime_checkable
class ExpectedCost(Cost, Protocol):
    """A cost that knows its expectation over random widths; see `PolynomialCost.expected`."""

    def expected(
        self, mean: Tensor, variance: Tensor, present: Mapping[str, Tensor] | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class _Linear:
    """`constant + sum(slope[g] * units of group g)`: the length of one tensor dimension."""

    constant: int
    slopes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Term:
    """A layer's share: `coefficient` times the product of its factors; nothing once `block` is removed."""

    layer: str
    coefficient: int
    factors: tuple[_Linear, ...]
    block: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> _Term:
        factors = (_Linear(f["constant"], tuple((g, s) for g, s in f["slopes"])) for f in data["factors"])
        return cls(data["layer"], data["coefficient"], tuple(factors), data["block"])


class PolynomialCost:
    """A cost that is quadratic in the widths: exact, batched, differentiable, and fast.

    Attributes:
        groups: Its variables, in the order of the columns of `batch`; G of them.
        full: The cost at full width.
    """

    def __init__(self, groups: Iterable[ChannelGroup], terms: Sequence[_Term], constant: int = 0) -> None:
        self.groups = tuple(groups)
        self._terms = terms
        self._constant = constant
        self._form = self._quadratic_form(terms, constant)  # (G + 1, G + 1)
        self._steps = torch.tensor([g.step for g in self.groups], dtype=torch.float64)  # (G,)
        column = {g.block: i for i, g in enumerate(self.groups)}  # a block's groups are 0 together
        self._blocks = tuple(dict.fromkeys(t.block for t in terms if t.block is not None))  # K of them
        self._columns = torch.tensor([column[b] for b in self._blocks], dtype=torch.long)  # (K,)
        forms = [self._quadratic_form(t for t in terms if t.block == b) for b in self._blocks]
        self._block_forms = torch.stack(forms) if forms else self._form.new_zeros(0, *self._form.shape)
        touched = self._block_forms.any(dim=2).any(dim=0)  # (G + 1,)
        around = [i for i, g in enumerate(self.groups) if g.block is None and touched[i]]
        self._around = torch.tensor(around, dtype=torch.long)  # (C,) groups that blocks do not remove
        kept = [*around, len(self.groups)]
        self._left_forms = self._block_forms[:, kept][:, :, kept]  # (K, C + 1, C + 1)
        self.full = self({})

    def to_dict(self) -> dict[str, Any]:
        """Its terms, for JSON; the groups are not among them."""
        return {"constant": self._constant, "terms": [asdict(term) for term in self._terms]}

    @staticmethod
    def from_dict(groups: Iterable[ChannelGroup], data: Mapping[str, Any]) -> PolynomialCost:
        """The cost that `to_dict` described, on the groups that it had then; no model is needed."""
        terms = [_Term.from_dict(term) for term in data["terms"]]
        return PolynomialCost(groups, terms, data["constant"])

    def _quadratic_form(self, terms: Iterable[_Term], constant: int = 0) -> Tensor:
        """The symmetric matrix (G + 1, G + 1) of terms; its last row and column stand for the constant 1."""
        size = len(self.groups)
        form = np.zeros((size + 1, size + 1))
        form[size, size] += constant
        for term in terms:
            a, b = (*term.factors, _Linear(1), _Linear(1))[:2]
            for i, x in (*a.slopes, (size, a.constant)):
                for j, y in (*b.slopes, (size, b.constant)):
                    form[i, j] += term.coefficient * x * y
        return torch.from_numpy((form + form.T) / 2)

    def __call__(self, widths: Mapping[str, int]) -> int:
        """The exact cost of a network; missing groups at full width.

        Raises:
            WidthError: Unknown group, or a width that the group cannot take.
        """
        return sum(self.by_layer(widths).values()) + self._constant

    def by_layer(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Each layer's share of the cost, in the model's order; 0 in removed blocks."""
        check_widths(self.groups, widths)
        removed = removed_blocks(self.groups, widths)
        units = [widths.get(g.name, g.size) // g.step for g in self.groups]
        shares: dict[str, int] = {}
        for term in self._terms:
            lengths = (f.constant + sum(slope * units[g] for g, slope in f.slopes) for f in term.factors)
            share = 0 if term.block in removed else term.coefficient * math.prod(lengths)
            shares[term.layer] = shares.get(term.layer, 0) + share
        return shares

    def batch(self, widths: Tensor) -> Tensor:
        """Costs (B,) float64 of widths (B, G), integer or real; differentiable.

        Columns follow `groups`. Widths are not checked: real ones are relaxations. Exactly 0 removes a block,
        and stands for all of its groups.
        """
        form, steps = self._form.to(widths.device), self._steps.to(widths.device)
        costs = []
        for part in widths.split(_CHUNK):
            units = part.to(torch.float64) / steps  # (b, G)
            cost = _value(form, units)
            costs.append(cost - self._left_over(units) if self._blocks else cost)
        return torch.cat(costs)

    def _removed(self, units: Tensor) -> Tensor:
        """Which blocks are removed: units (B, G) -> (B, K) bool."""
        return units.index_select(1, self._columns.to(units.device)) == 0

    def _left_over(self, units: Tensor) -> Tensor:
        """What the form still counts of removed blocks: units (B, G) -> (B,)."""
        removed = self._removed(units)
        if not bool(removed.any()):
            return units.new_zeros(())
        around = units.index_select(1, self._around.to(units.device))
        return (_values(self._left_forms.to(units.device), around) * removed).sum(1)

    def layers(self) -> dict[str, PolynomialCost]:
        """Each layer's share as a cost of its own, in the model's order; without the constant."""
        terms: dict[str, list[_Term]] = {}
        for term in self._terms:
            terms.setdefault(term.layer, []).append(term)
        return {layer: PolynomialCost(self.groups, of_layer) for layer, of_layer in terms.items()}

    def expected(self, mean: Tensor, variance: Tensor, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Expected costs (B,) of independent random widths with mean and variance (B, G); differentiable.

        A layer whose input and output are one group costs E[c^2] = E[c]^2 + Var[c], not E[c]^2.

        Args:
            mean, variance: Of the widths; those of a block's groups given that it is there.
            present: Residual block -> the probability (B,) that it is there, independent of the widths; one
                that is not named is there for sure.

        Raises:
            WidthError: `present` names no residual block of the groups.
        """
        self._check_blocks(present or {})
        form, steps = self._form.to(mean.device), self._steps.to(mean.device)
        units, squared = mean.to(torch.float64) / steps, variance.to(torch.float64) / steps**2
        everything = _value(form, units) + squared @ form.diagonal()[:-1]
        if not self._blocks:
            return everything
        forms = self._block_forms.to(mean.device)
        blocks = _values(forms, units) + squared @ forms.diagonal(dim1=1, dim2=2)[:, :-1].T  # (B, K)
        sure = blocks.new_ones(len(blocks))
        there = torch.stack([(present or {}).get(b, sure).to(blocks) for b in self._blocks], dim=1)  # (B, K)
        absent = (1 - there).masked_fill(self._removed(units), 1)
        return everything - (absent * blocks).sum(1)

    def _check_blocks(self, names: Iterable[str]) -> None:
        known = {g.block: None for g in self.groups if g.block is not None}
        for name in names:
            if name not in known:
                raise WidthError(f"no residual block {name!r} in these groups{nearest(name, known)}")


def expected_cost(
    cost: Cost, mean: Tensor, variance: Tensor, present: Mapping[str, Tensor] | None = None
) -> Tensor:
    """`PolynomialCost.expected` of any cost: one that cannot say it is taken at the mean widths."""
    if isinstance(cost, ExpectedCost):
        return cost.expected(mean, variance, present)
    return cost.batch(mean)


def _value(form: Tensor, units: Tensor) -> Tensor:
    """A quadratic form (G + 1, G + 1) of units (B, G): (B,)."""
    half = units @ form[:-1, :-1] + 2 * form[:-1, -1]
    return (half * units).sum(1) + form[-1, -1]


def _values(forms: Tensor, units: Tensor) -> Tensor:
    """Quadratic forms (K, G + 1, G + 1) of units (B, G): (B, K)."""
    half = units @ forms[:, :-1, :-1] + 2 * forms[:, None, :-1, -1]  # (K, B, G)
    return ((half * units).sum(2) + forms[:, None, -1, -1]).T


def width_costs(groups: Iterable[ChannelGroup]) -> dict[str, PolynomialCost]:
    """Each group's number of channels as a cost."""
    groups = tuple(groups)
    return {
        g.name: PolynomialCost(groups, [_Term(g.name, g.step, (_Linear(0, ((i, 1),)),), g.block)])
        for i, g in enumerate(groups)
    }


def block_costs(groups: Iterable[ChannelGroup]) -> dict[str, PolynomialCost]:
    """Each residual block as a cost: 1 while it is there."""
    groups = tuple(groups)
    blocks = dict.fromkeys(g.block for g in groups if g.block is not None)
    return {block: PolynomialCost(groups, [_Term(block, 1, (), block)]) for block in blocks}


def weighted_sum(
    costs: Sequence[PolynomialCost], weights: Sequence[float], constant: float
) -> PolynomialCost:
    """`constant + sum(weight * cost)` of costs of the same groups.

    Every coefficient is rounded to a whole number, so that arithmetic on it is exact as on the costs
    themselves: choose weights that make the values large, below 2**53.
    """
    terms = [
        replace(term, coefficient=round(weight * term.coefficient))
        for cost, weight in zip(costs, weights, strict=True)
        for term in cost._terms
    ]
    constants = (weight * cost._constant for cost, weight in zip(costs, weights, strict=True))
    return PolynomialCost(costs[0].groups, terms, round(constant + sum(constants)))


class ParamsCost(PolynomialCost):
    """Number of parameters (not buffers) of the model cut to given widths.

    Args:
        model: The full model.
        groups: Its channel groups.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        groups = tuple(groups)
        lengths, block_of = _dimension_lengths(groups), _block_finder(groups)
        terms = []
        for name, parameter in model.named_parameters():
            layer, _, attribute = name.rpartition(".")
            dims = lengths.get((layer, attribute), {})
            terms.append(_numel_term(layer, parameter, dims, 1, block_of(layer)))
        super().__init__(groups, terms)


class FlopsCost(PolynomialCost):
    """Multiply-adds of the model cut to given widths: fvcore's count on the cut model, without cutting.

    Args:
        model: The full model; it is analysed in eval mode and comes back as it was.
        example_inputs: As for `find_channel_groups`. A batch counts as often as it has samples.
        groups: The model's channel groups.

    Raises:
        UnsupportedModelError: Matrix products outside of layers depend on the widths.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, groups: Iterable[ChannelGroup]) -> None:
        groups = tuple(groups)
        counts = count_by_module(model, example_inputs)
        lengths, block_of = _dimension_lengths(groups), _block_finder(groups)
        blocks = {g.block for g in groups}
        terms = []
        products = _products(model, "", counts)
        constant = products
        for layer, amount, factors in _product_factors(groups):
            if not counts.get(layer):
                continue  # fvcore does not count it: the recurrent layers'
            block = block_of(layer)
            terms.append(_Term(layer, amount, factors, block))
            full = _full(terms[-1], groups)
            if _is_counted(model.get_submodule(layer)):  # a layer that runs for each channel
                counts = {**counts, layer: counts[layer] - full}
                continue
            constant -= full
            if block is not None:
                counts = {**counts, block: counts[block] - full}
        for name, module in model.named_modules():
            if name in blocks and (in_block := _products(module, name, counts)):
                terms.append(_Term(name, in_block, (), name))
                constant -= in_block
            if _is_counted(module) and counts.get(name):
                weight = module.weight
                positions, remainder = divmod(counts[name], weight.numel())
                if remainder:
                    raise UnsupportedModelError(
                        f"fvcore counts {counts[name]} multiply-adds for {name!r}, which is no multiple of "
                        f"its {weight.numel()} weights"
                    )
                dims = lengths.get((name, "weight"), {})
                terms.append(_numel_term(name, weight, dims, positions, block_of(name)))
        super().__init__(groups, terms, constant)
        if products:
            self._check_products(model, example_inputs, products)

    def _check_products(self, model: nn.Module, example_inputs: Inputs, products: int) -> None:
        narrow = {g.name: max(g.size // 2 // g.step, 1) * g.step for g in self.groups if g.frozen is None}
        found = count_flops(shrink(model, self.groups, narrow), example_inputs)
        if found != self(narrow):
            raise UnsupportedModelError(
                f"{products} multiply-adds lie in matrix products outside of layers and depend on "
                f"the widths in a way that this cost does not follow: on a narrow network {found} are "
                f"counted, not {self(narrow)}"
            )


def _product_factors(groups: Sequence[ChannelGroup]) -> Iterator[tuple[str, int, tuple[_Linear, ...]]]:
    """Products outside of layers that depend on widths: module, coefficient, lengths of the dimensions."""
    found: dict[int, dict[int, list[tuple[int, Product]]]] = {}
    for i, g in enumerate(groups):
        for p in g.products:
            found.setdefault(p.number, {}).setdefault(p.dimension, []).append((i, p))
    for dims in found.values():
        first = next(iter(dims.values()))[0][1]
        layer, amount, factors = first.layer, first.amount, []
        for parts in dims.values():
            free = [(i, p) for i, p in parts if groups[i].frozen is None]
            if not free:
                continue
            size = parts[0][1].size
            slopes = tuple((i, p.entries * groups[i].step // groups[i].size) for i, p in free)
            factors.append(_Linear(size - sum(p.entries for _, p in free), slopes))
            amount //= size
        if len(factors) > 2:
            raise UnsupportedModelError(f"a matrix product in {layer!r} depends on {len(factors)} widths")
        yield layer, amount, tuple(factors)


def _full(term: _Term, groups: Sequence[ChannelGroup]) -> int:
    lengths = (
        f.constant + sum(s * groups[g].size // groups[g].step for g, s in f.slopes) for f in term.factors
    )
    return term.coefficient * math.prod(lengths)


def _is_counted(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear))


def _products(module: nn.Module, name: str, counts: Mapping[str, int]) -> int:
    """Multiply-adds of matrix products outside of layers, under a module of this dotted name."""
    layers = (n for n, m in module.named_modules(prefix=name) if _is_counted(m))
    return counts.get(name, 0) - sum(counts.get(layer, 0) for layer in layers)


def count_flops(model: nn.Module, example_inputs: Inputs) -> int:
    """Multiply-adds of one forward pass, counted by fvcore under this project's convention."""
    return count_by_module(model, example_inputs)[""]


def count_by_module(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """Multiply-adds under each module's dotted name, its children's included; "" is the total."""
    if isinstance(example_inputs, Mapping):
        model, example_inputs = _Positional(model, list(example_inputs)), list(example_inputs.values())
        prefix = "model"
    else:
        prefix = ""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with preserved(model), unfused_attention(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit announces its retirement
        model.eval()
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        for op in NOT_COUNTED:
            analysis.set_op_handle(op, _nothing)  # None would leave the default handle in force
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
        analysis.set_op_handle("aten::einsum", _einsum_flops)
        try:
            by_module = analysis.by_module()
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UnsupportedModelError(
                f"fvcore cannot count this model, which must be traceable by torch.jit: {reason}"
            ) from error
    if not prefix:
        return {name: int(count) for name, count in by_module.items()}
    return {
        name[len(prefix) :].lstrip("."): int(count)
        for name, count in by_module.items()
        if name.split(".")[0] == prefix
    }


class _Positional(nn.Module):
    """Lets a model with named inputs be traced with positional ones."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Any) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)))


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore handle of an operation that is not counted."""
    return 0


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore handle: the two matrix products of attention, Q K^T and (Q K^T) V."""
    query, key, value = (i.type().sizes() for i in inputs[:3])
    pairs = math.prod(query[:-1]) * key[-2]
    return pairs * query[-1] + pairs * value[-1]


def _einsum_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore handle: the product of all lengths. Its own reads a number that is printed with four digits."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [v.type().sizes() for v in inputs[1].node().inputs()]
    lengths: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        names = [*before, *(f".{i}" for i in range(len(shape) - len(before + after), 0, -1) if dots), *after]
        for name, length in zip(names, shape, strict=True):
            lengths[name] = max(lengths.get(name, 1), length)
    return math.prod(lengths.values()) if len(terms) > 1 else 0


def _dimension_lengths(groups: Sequence[ChannelGroup]) -> dict[tuple[str, str], dict[int, _Linear]]:
    """For each tensor (layer, name) that groups touch: dimension -> its length in units of the groups."""
    axes: dict[Any, list[tuple[int, Member]]] = {}
    for i, g in enumerate(groups):
        for m in g.members:
            axes.setdefault(m.axis, []).append((i, m))
    lengths: dict[tuple[str, str], dict[int, _Linear]] = {}
    for (layer, *_), parts in axes.items():
        free = [(i, m) for i, m in parts if groups[i].frozen is None]
        for name, dim in parts[0][1].tensors:
            blocks = parts[0][1].blocks_of(name)
            constant = parts[0][1].size - sum(m.multiplicity * groups[i].size for i, m in free)
            slopes = tuple((i, m.multiplicity * groups[i].step // blocks) for i, m in free)
            lengths.setdefault((layer, name), {})[dim] = _Linear(constant // blocks, slopes)
    return lengths


def _block_finder(groups: Sequence[ChannelGroup]) -> Callable[[str], str | None]:
    """Layer -> the residual block that it lies in."""
    blocks = list(dict.fromkeys(g.block for g in groups if g.block is not None))
    return lambda layer: next((b for b in blocks if lies_in(layer, [b])), None)


def _numel_term(
    layer: str, tensor: Tensor, dims: Mapping[int, _Linear], coefficient: int, block: str | None
) -> _Term:
    """`coefficient` times the tensor's number of elements, as a function of the widths."""
    if len(dims) > 2:
        raise UnsupportedModelError(f"a tensor of {layer!r} is cut along {len(dims)} dimensions")
    fixed = math.prod(n for d, n in enumerate(tensor.shape) if d not in dims)
    return _Term(layer, coefficient * fixed, tuple(dims[d] for d in sorted(dims)), block)


_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def readable(amount: float) -> str:
    """A count with the unit that people would use: 1814073344 -> "1.81G"."""
    for suffix, scale in reversed(_SUFFIX.items()):
        if amount >= scale:
            return f"{amount / scale:.4g}{suffix}"
    return f"{amount:.4g}"


@dataclass(frozen=True)
class Limit:
    """An upper bound: `amount` of the cost `kind`, or that share of the full network's."""

    kind: str
    amount: float
    relative: bool

    def __str__(self) -> str:
        if self.relative:
            return f"{self.kind} <= {self.amount:.4g} of the full network"
        return f"{self.kind} <= {self.readable(self.amount)}"

    def readable(self, amount: float) -> str:
        """An amount of this kind of cost with its unit: "1.81G", "3.2 ms"."""
        return f"{amount:.4g} ms" if self.kind == "latency_ms" else readable(amount)


@dataclass(frozen=True)
class Budget:
    """Upper bounds that a network must keep, all of them.

    Make it with `Budget.parse`. It says nothing about a model until `bound` gives it that model's costs.
    """

    limits: tuple[Limit, ...]

    KINDS = ("flops", "params", "latency_ms")

    @classmethod
    def parse(cls, value: Budget | float | str | Mapping[str, float | str]) -> Budget:
        """Reads a budget: `"300M"`, `1.04e9`, `0.5`, `"50%"`, or `{"flops": "300M", "latency_ms": 20}`.

        A number up to 1, or a percentage, is relative to the full network. A plain value bounds FLOPs.
        `latency_ms` is in milliseconds; write one or less of them with the unit: `"0.8ms"`.

        Raises:
            BudgetError: Not a positive number, an unknown kind of cost, or a unit of another kind.
        """
        if isinstance(value, Budget):
            return value
        limits = value if isinstance(value, Mapping) else {"flops": value}
        if not limits:
            raise BudgetError("an empty budget bounds nothing; name one, such as {'flops': 0.5}")
        return cls(tuple(cls._limit(kind, amount) for kind, amount in limits.items()))

    @classmethod
    def _limit(cls, kind: str, value: float | str) -> Limit:
        if kind not in cls.KINDS:
            raise BudgetError(f"a budget bounds {' or '.join(cls.KINDS)}, not {kind!r}")
        amount, relative = _amount(kind, value)
        return Limit(kind, amount, relative)

    @property
    def is_relative(self) -> bool:
        return all(limit.relative for limit in self.limits)

    def bound(self, costs: Mapping[str, Cost]) -> Bounds:
        """The budget on one model: its costs by kind, and the most that each may be.

        Raises:
            BudgetError: A kind of cost that the budget bounds is not given.
        """
        bounds: list[tuple[Limit, Cost, float]] = []
        for limit in self.limits:
            if limit.kind not in costs:
                raise BudgetError(
                    f"the budget bounds {limit.kind}, but that cost is not given for this model"
                )
            cost = costs[limit.kind]
            most = limit.amount * cost.full if limit.relative else limit.amount
            bounds.append((limit, cost, math.floor(most) if isinstance(cost.full, int) else most))
        return Bounds(tuple(bounds))

    def __str__(self) -> str:
        return " and ".join(map(str, self.limits))


@dataclass(frozen=True)
class Bounds:
    """A budget on one model: for each limit its cost and the largest allowed value."""

    limits: tuple[tuple[Limit, Cost, float], ...]

    def fits(self, widths: Mapping[str, int]) -> bool:
        return all(cost(widths) <= most for _, cost, most in self.limits)

    def fits_batch(self, widths: Tensor) -> Tensor:
        """Which of the widths (B, G) keep every limit: (B,) bool."""
        return torch.stack([cost.batch(widths) <= most for _, cost, most in self.limits]).all(0)

    def used(self, widths: Mapping[str, int]) -> float:
        """The share of the tightest limit that the network uses; at most 1 inside the budget."""
        return max(cost(widths) / most for _, cost, most in self.limits)

    def used_batch(self, widths: Tensor) -> Tensor:
        """`used` for widths (B, G): (B,)."""
        return torch.stack([cost.batch(widths) / most for _, cost, most in self.limits]).amax(0)

    def check_reachable(self, smallest: Mapping[str, int], largest: Mapping[str, int]) -> None:
        """Raises `BudgetError` with the reachable range if not even the smallest network fits."""
        for limit, cost, most in self.limits:
            least = cost(smallest)
            if least > most:
                raise BudgetError(
                    f"{limit.kind}: {limit.readable(most)} is below the smallest network of this space "
                    f"({limit.readable(least)}); reachable are {limit.readable(least)} to "
                    f"{limit.readable(cost(largest))}: raise the budget or lower min_ratio"
                )


_AMOUNT = re.compile(
    r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([KMGT%]?|MS)\s*", re.IGNORECASE
)


def _amount(kind: str, value: Any) -> tuple[float, bool]:
    """A budget's number, and whether it is relative."""
    unit = ""
    examples = "20, 0.8ms, 50% or 0.5" if kind == "latency_ms" else "300M, 1.04G, 50% or 0.5"
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value)
        if not match:
            raise BudgetError(f"cannot read the budget {value!r}; write {examples}")
        number, unit = float(match[1]), match[2].upper()
        if unit not in (("", "%", "MS") if kind == "latency_ms" else ("%", *_SUFFIX)):
            counted = "milliseconds" if kind == "latency_ms" else "a count"
            raise BudgetError(f"{kind} is {counted}: {value!r} has the wrong unit; write {examples}")
    elif isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
    else:
        raise BudgetError(f"a budget is a number or a text such as {examples.split(',')[0]}, not {value!r}")
    if not (math.isfinite(number) and number > 0):
        raise BudgetError(f"a budget must be positive, not {value!r}")
    if unit == "%":
        if number > 100:
            raise BudgetError(f"a share of the full network is at most 100%, not {value!r}")
        return number / 100, True
    return number * _SUFFIX.get(unit, 1.0), number <= 1 and not unit
