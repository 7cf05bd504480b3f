"""One loss for several sub-networks: against a slow reference, in ordinary training loops, and in memory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice, repeat
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, Net, conv, head
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nni_dbs.errors import TrainingError
from nni_dbs.sampling import (
    Step,
    bcnet,
    draw_options,
    draw_paths,
    in_parallel,
    path_fair,
    sandwich,
    spfs,
    uniform,
)
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.steps import SupernetStep, kl_divergence, logits_of, step_loss
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import (
    ChannelGroup,
    channel_order,
    find_channel_groups,
    kept_channels,
    prefix_order,
    shrink,
)
from torch_pruning_adapters.surgery import keep_mask, kept_entries, layer_axes

Gradients = dict[str, Tensor]
Groups = Sequence[ChannelGroup]


def twins() -> Net:
    """Two bare parameters whose gradients are one and the same tensor."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.bn(net.a(x)).relu()) + (net.p + net.q)

    return Net(
        forward,
        a=conv(3, 6),
        bn=nn.BatchNorm2d(6),
        fc=nn.Linear(6, 10),
        p=nn.Parameter(torch.randn(10)),
        q=nn.Parameter(torch.randn(10)),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: CASES["plain"].build()[0],  # with BatchNorm
    "depthwise": lambda: CASES["depthwise"].build()[0],
    "shared": lambda: CASES["shared"].build()[0],
    "layer_scale": lambda: CASES["layer_scale"].build()[0],
    "twins": lambda: twins().double(),
}


def build(name: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().train()


@functools.cache
def groups_of(name: str = "plain") -> tuple[ChannelGroup, ...]:
    return tuple(find_channel_groups(build(name).eval(), torch.zeros(2, 3, 8, 8, dtype=torch.float64)))


def space_of(name: str = "plain") -> WidthSpace:
    return WidthSpace(groups_of(name), min_ratio=0.3, divisor=1)


def data(images: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (images,), generator=generator)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cross_entropy(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def supernet_step(
    model: nn.Module, steps: Iterator[Step], training_step: Callable[..., Any] = cross_entropy, **kwargs: Any
) -> SupernetStep:
    """Of the net `plain`, channels in the model's order."""
    groups = groups_of()
    return SupernetStep(Supernet(model, groups, prefix_order(groups)), steps, training_step, **kwargs)


def three(**kwargs: Any) -> Step:
    """Largest, one between, smallest."""
    space = space_of()
    middle = Widths({"a": 4, "b": 3})
    return Step((space.largest(), middle, space.smallest()), **kwargs)


def gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: Gradients, expected: Gradients, tolerance: float = 1e-12) -> None:
    """Relative to each parameter's largest gradient; a bias before BatchNorm has none but rounding."""
    assert actual.keys() == expected.keys()
    rounding = 1e-14 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        bound = tolerance * float(gradient.abs().max()) + rounding
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=bound)


def assert_equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# --- the slow reference: networks cut for each pass, every graph alive, one backward -------------------


def narrow(
    model: nn.Module, groups: Groups, order: Any, widths: Mapping[str, int]
) -> Callable[[Tensor], Any]:
    """The cut network, computing with differentiable selections of the full model's parameters."""
    small = shrink(model, groups, widths, order).train(model.training)
    keep = keep_mask(groups, kept_channels(groups, widths, order))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for layer, tensors in kept_entries(layer_axes(groups), keep).items():
        for tensor, dims in tensors.items():
            name = f"{layer}.{tensor}".lstrip(".")
            for dim, index in dims.items() if name in parameters else ():
                parameters[name] = parameters[name].index_select(dim, torch.from_numpy(index))
    return lambda x: functional_call(small, parameters, (x,))


def reference_loss(
    model: nn.Module, groups: Groups, order: Any, step: Step, images: Tensor, labels: Tensor
) -> Tensor:
    if step.mirrored:
        sides = [{name: np.asarray(ranked)[::-1] for name, ranked in order.items()}, order]
        once = [reference_loss(model, groups, side, Step(step.networks), images, labels) for side in sides]
        return torch.stack(once).mean()
    networks = [narrow(model, groups, order, widths) for widths in step.networks]
    if step.parallel and not step.distilled:
        parts = zip(networks, images.chunk(len(networks)), labels.chunk(len(networks)), strict=True)
        losses = [F.cross_entropy(network(x), y) for network, x, y in parts]
        return torch.stack(losses).mean()
    logits = [network(images) for network in networks]
    if not step.distilled:
        return torch.stack([F.cross_entropy(z, labels) for z in logits]).sum()
    teacher = logits[0].detach().log_softmax(1)
    losses = [F.kl_div(z.log_softmax(1), teacher, log_target=True, reduction="batchmean") for z in logits[1:]]
    return torch.stack([F.cross_entropy(logits[0], labels), *losses]).sum()


def rule(name: str, space: WidthSpace) -> Iterator[Step]:
    pool = [space.sample(seeded(k)) for k in range(9)]
    return {
        "uniform": lambda: uniform(space, seeded()),
        "bcnet": lambda: bcnet(space, seeded()),
        "sandwich": lambda: sandwich(space, seeded(), 3),
        "path_fair": lambda: path_fair(draw_paths(pool, seeded(), 3)),
        "path_fair_options": lambda: path_fair(draw_options(space, seeded(), 3)),
        "spfs": lambda: spfs(space, draw_paths(pool, seeded(), 2)),
        "parallel": lambda: in_parallel(sandwich(space, seeded(), 4)),
        "parallel_distilled": lambda: in_parallel(path_fair(draw_paths(pool, seeded(), 3)), distilled=True),
    }[name]()


RULES = (
    "uniform",
    "bcnet",
    "sandwich",
    "path_fair",
    "path_fair_options",
    "spfs",
    "parallel",
    "parallel_distilled",
)


@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("ranked", [True, False], ids=["l2_order", "prefix_order"])
@pytest.mark.parametrize("net", NETS)
def test_loss_and_gradients_equal_those_of_a_slow_reference(net: str, ranked: bool, rule_name: str) -> None:
    model, groups, batch = build(net), groups_of(net), data()
    order = channel_order(model, groups) if ranked else prefix_order(groups)
    supernet = Supernet(model, groups, None if ranked else order)
    training_step = SupernetStep(supernet, rule(rule_name, space_of(net)), cross_entropy)
    for step in islice(rule(rule_name, space_of(net)), 2):
        networks = step.networks if step.parallel else tuple(dict.fromkeys(step.networks))
        distinct = dataclasses.replace(step, networks=networks)
        model.zero_grad()
        expected_loss = reference_loss(model, groups, order, distinct, *batch)
        expected_loss.backward()
        expected = gradients_of(model)

        model.zero_grad()
        loss = training_step(batch, model)
        assert loss.dim() == 0
        loss.backward()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        assert_close(gradients_of(model), expected)


def test_a_parallel_distilled_step_equals_the_serial_one_on_the_same_images() -> None:
    found = []
    for parallel in (False, True):
        model = build()
        loss = supernet_step(model, repeat(three(distilled=True, parallel=parallel)))(data(), model)
        loss.backward()
        found.append((loss.detach(), gradients_of(model)))
    (serial_loss, serial), (parallel_loss, at_once) = found
    torch.testing.assert_close(parallel_loss, serial_loss, rtol=1e-12, atol=0)
    assert_close(at_once, serial)


def test_a_penalty_on_the_weights_counts_in_every_pass() -> None:
    """The training step reads parameters outside of their layers, so it reads whole ones."""

    def penalised(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return cross_entropy(batch, model) + 0.1 * sum(p.square().sum() for p in model.parameters())

    model, groups, batch, step = build(), groups_of(), data(), three()
    supernet = Supernet(model, groups, prefix_order(groups))
    losses = []
    for widths in step.networks:
        with supernet.at(widths):
            losses.append(penalised(batch, model))
    torch.stack(losses).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    step_loss(supernet, step, lambda: penalised(batch, model)).backward()
    assert_close(gradients_of(model), expected)


def widths_run(model: nn.Module) -> list[int]:
    """Collects the widths of group `a` in each pass from now on."""
    seen: list[int] = []
    model.a.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    return seen


def test_equal_networks_are_trained_once() -> None:
    space, model = space_of(), build()
    seen = widths_run(model)
    drawn = (space.smallest(), Widths({"a": 4, "b": 5}), space.largest())
    supernet_step(model, spfs(space, iter([drawn])))(data(), model)
    assert seen == [6, space.smallest()["a"], 4]


# --- distillation ------------------------------------------------------------------------------------


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    assert not teacher.requires_grad
    return (student - teacher).square().sum(1).mean()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("distill", [kl_divergence, squared_distance])
def test_no_student_sends_a_gradient_to_its_teacher(distill: Any, parallel: bool) -> None:
    """Channels that only the largest network has get the gradient of its hard labels alone."""
    model, batch, space = build(), data(), space_of()
    cross_entropy(batch, model).backward()
    expected = gradients_of(model)
    model.zero_grad()
    step = Step((space.largest(), space.smallest()), distilled=True, parallel=parallel)
    supernet_step(model, iter([step]), distill=distill)(batch, model).backward()
    actual = gradients_of(model)
    a, b = space.smallest()["a"], space.smallest()["b"]
    for name, surplus in (
        ("a.weight", slice(a, None)),
        ("bn.weight", slice(a, None)),
        ("b.weight", (slice(None), slice(a, None))),
        ("b.weight", slice(b, None)),
        ("fc.weight", (slice(None), slice(b, None))),
    ):
        assert expected[name][surplus].abs().max() > 0
        if parallel:
            torch.testing.assert_close(actual[name][surplus], expected[name][surplus], rtol=1e-10, atol=1e-14)
        else:
            assert torch.equal(actual[name][surplus], expected[name][surplus])
    assert not torch.equal(actual["fc.weight"][:, :b], expected["fc.weight"][:, :b])


def test_kl_divergence_by_hand() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]], dtype=torch.float64)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert kl_divergence(student, teacher).item() == pytest.approx((first + second) / 2, rel=1e-14)


def test_kl_divergence_is_zero_between_equal_distributions_and_never_negative() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert kl_divergence(logits, logits).item() == 0
    assert kl_divergence(logits + 3, logits).item() == pytest.approx(0, abs=1e-15)
    assert all(kl_divergence(torch.randn(5, 7), torch.randn(5, 7)) > 0 for _ in range(20))


def test_kl_divergence_has_no_gradient_for_the_teacher() -> None:
    student, teacher = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kl_divergence(student, teacher).backward()
    assert teacher.grad is None
    expected = (student.softmax(1) - teacher.softmax(1)).detach() / 4
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-15)


def test_kl_divergence_of_dense_logits_is_the_mean_over_images_and_places() -> None:
    student, teacher = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2))
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (student, teacher)]
    torch.testing.assert_close(kl_divergence(student, teacher), kl_divergence(*flat), rtol=1e-13, atol=0)


Outputs = namedtuple("Outputs", ["logits", "aux"])


class WithLogits(OrderedDict):  # as the outputs of Transformers
    @property
    def logits(self) -> Tensor:
        return self["logits"]


def _first(outputs: Any) -> Tensor:
    return outputs[0]


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z, aux: (z, aux), _first),
    "namedtuple": (Outputs, _first),
    "namedtuple whose logits come last": (
        lambda z, aux: namedtuple("Reversed", ["aux", "logits"])(aux, z),
        lambda o: o.logits,
    ),
    "dict": (lambda z, aux: {"aux": aux, "out": z}, lambda o: o["out"]),
    "object": (lambda z, aux: SimpleNamespace(aux=aux, logits=z), lambda o: o.logits),
    "mapping": (lambda z, aux: WithLogits(aux=aux, logits=z), lambda o: o.logits),
}


UNKNOWN = ("object", "mapping")  # classes that PyTorch's tree_map does not look into


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [(kind, False) for kind in OUTPUTS] + [(kind, True) for kind in OUTPUTS if kind not in UNKNOWN],
)
def test_logits_are_found_in_every_kind_of_output(kind: str, parallel: bool) -> None:
    """As in networks with auxiliary classifiers in train mode; these learn from the labels alone."""
    pack, unpack = OUTPUTS[kind]
    model, batch, step = build(), data(), three(distilled=True, parallel=parallel)
    expected_loss = supernet_step(model, iter([step]))(batch, model)
    expected_loss.backward()
    expected = gradients_of(model)

    tupled = build()
    run = tupled._run
    tupled._run = lambda net, x: pack(run(net, x), torch.full((len(x), 2), 9.0, dtype=x.dtype))
    loss = supernet_step(tupled, iter([step]), lambda b, m: F.cross_entropy(unpack(m(b[0])), b[1]))(
        batch, tupled
    )
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_close(gradients_of(tupled), expected)


class Labelled(nn.Module):
    """A model that computes the loss itself, as those of Transformers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> WithLogits:
        logits = self.net(x)
        if labels is None:
            return WithLogits(logits=logits)
        return WithLogits(loss=F.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("parallel", [False, True])
def test_students_learn_from_the_teacher_alone_where_the_model_computes_the_loss(parallel: bool) -> None:
    """The loss of replicated labels would be that of all networks, so it is refused."""
    images, labels = data()
    model = Labelled(build())
    groups = find_channel_groups(model.eval(), images)
    model.train()
    space = WidthSpace(groups, min_ratio=0.3, divisor=1)
    step = Step((space.largest(), space.uniform(0.6), space.smallest()), distilled=True, parallel=parallel)
    order = prefix_order(groups)
    networks = [narrow(model, groups, order, widths) for widths in step.networks]
    logits = [network(images).logits for network in networks]
    expected = F.cross_entropy(logits[0], labels) + sum(kl_divergence(z, logits[0]) for z in logits[1:])
    supernet = Supernet(model, groups, order)
    if parallel:
        with pytest.raises(TrainingError, match="compute it in the training step from the logits"):
            step_loss(supernet, step, lambda: model(images, labels=labels)["loss"])
        return
    loss = step_loss(supernet, step, lambda: model(images, labels=labels)["loss"])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_distillation_averages_over_several_calls_of_the_model() -> None:
    """A batch in two halves: each pass normalises the halves apart, and so does the reference."""
    model, (images, labels), space = build(), data(), space_of()
    order = prefix_order(groups_of())
    step = Step((space.largest(), space.smallest()), distilled=True)

    def halves(batch: Any, model: nn.Module) -> Tensor:
        losses = [cross_entropy(half, model) for half in zip(images.chunk(2), labels.chunk(2), strict=True)]
        return torch.stack(losses).mean()

    parts = zip(images.chunk(2), labels.chunk(2), strict=True)
    expected = torch.stack([reference_loss(model, groups_of(), order, step, *part) for part in parts]).mean()
    torch.testing.assert_close(
        supernet_step(model, iter([step]), halves)(None, model), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_distilling_without_a_call_of_the_model_is_refused(parallel: bool) -> None:
    model = build()

    def around(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model.forward(batch[0]), batch[1])

    with pytest.raises(TrainingError, match="did not call the model itself"):
        supernet_step(model, iter([three(distilled=True, parallel=parallel)]), around)(data(), model)
    assert "forward" not in vars(model) and not model._forward_hooks and not model._forward_pre_hooks


def test_augmenting_inside_the_training_step_is_refused_only_where_networks_must_see_the_same() -> None:
    model = build()

    def augmenting(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return cross_entropy((batch[0] + torch.randn_like(batch[0]), batch[1]), model)

    with pytest.raises(TrainingError, match="augment in the data loader"):
        supernet_step(model, iter([three(distilled=True)]), augmenting)(data(), model)
    assert all(p.grad is None for p in model.parameters())
    supernet_step(model, iter([three()]), augmenting)(data(), model).backward()
    supernet_step(model, iter([three(distilled=True, parallel=True)]), augmenting)(data(), model).backward()


@pytest.mark.parametrize("parallel", [False, True])
def test_a_distilled_step_of_one_network_learns_from_the_labels(parallel: bool) -> None:
    model, batch = build(), data()
    cross_entropy(batch, model).backward()
    expected = gradients_of(model)
    model.zero_grad()
    step = Step((space_of().largest(),), distilled=True, parallel=parallel)
    supernet_step(model, iter([step]))(batch, model).backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("failing_pass", [0, 1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_an_error_in_the_training_step_leaves_the_model_as_it_was(parallel: bool, failing_pass: int) -> None:
    model, passes = build(), 0

    def failing(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        nonlocal passes
        passes += 1
        loss = cross_entropy(batch, model)
        if passes == (1 if parallel else failing_pass + 1):
            raise RuntimeError("failed")
        return loss

    before = {name: (id(t), t.shape) for name, t in model.named_parameters()}
    step = supernet_step(model, repeat(three(distilled=True, parallel=parallel)), failing)
    with pytest.raises(RuntimeError, match="failed"):
        step(data(), model)
    assert {name: (id(t), t.shape) for name, t in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_hooks and not model._forward_pre_hooks


# --- the user's loop ---------------------------------------------------------------------------------


def trained(
    loop: Callable[[nn.Module, torch.optim.Optimizer, SupernetStep, list[Any]], None],
    model: nn.Module | None = None,
    batches: list[Any] | None = None,
    steps: Iterator[Step] | None = None,
) -> dict[str, Tensor]:
    """Weights and statistics after a loop over four batches."""
    model = build() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = [data(seed=seed) for seed in range(4)] if batches is None else batches
    space = space_of()
    steps = sandwich(space, seeded(), 4) if steps is None else steps
    loop(model, optimizer, supernet_step(model, steps), batches)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def zero_before(set_to_none: bool) -> Callable[..., None]:
    def loop(
        model: nn.Module, optimizer: torch.optim.Optimizer, step: SupernetStep, batches: list[Any]
    ) -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none)
            loss = step(batch, model)
            loss.backward()
            optimizer.step()

    return loop


def zero_after(set_to_none: bool) -> Callable[..., None]:
    def loop(
        model: nn.Module, optimizer: torch.optim.Optimizer, step: SupernetStep, batches: list[Any]
    ) -> None:
        for batch in batches:
            loss = step(batch, model)
            optimizer.zero_grad(set_to_none)
            loss.backward()
            optimizer.step()

    return loop


@pytest.mark.parametrize("loop", [zero_before(False), zero_after(True), zero_after(False)])
def test_gradients_may_be_cleared_before_or_after_the_training_step(loop: Callable[..., None]) -> None:
    assert_equal(trained(loop), trained(zero_before(True)))


def test_gradients_of_two_batches_add_up() -> None:
    model, batches = build(), [data(seed=1), data(seed=2)]
    steps = [three(distilled=True), three()]
    alone = []
    for batch, step in zip(batches, steps, strict=True):
        model.zero_grad()
        supernet_step(model, iter([step]))(batch, model).backward()
        alone.append(gradients_of(model))
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]}

    model.zero_grad()
    training_step = supernet_step(model, iter(steps))
    for batch in batches:
        training_step(batch, model).backward()
    assert_equal(gradients_of(model), expected)

    model.zero_grad()
    training_step = supernet_step(model, iter(steps))
    sum(training_step(batch, model) for batch in batches).backward()
    assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("factor", [0.25, -3.0, 0.0])
def test_a_factor_on_the_loss_is_one_on_every_gradient(factor: float) -> None:
    model = build()
    training_step = supernet_step(model, repeat(three(distilled=True)))
    training_step(data(), model).backward()
    expected = {name: factor * gradient for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    (factor * training_step(data(), model)).backward()
    assert_close(gradients_of(model), expected)


def test_autograd_grad_works_as_backward_does() -> None:
    model = build()
    training_step = supernet_step(model, repeat(three(distilled=True)))
    training_step(data(), model).backward()
    expected = gradients_of(model)
    model.zero_grad()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(training_step(data(), model), parameters)
    assert_equal(dict(zip(names, found, strict=True)), expected)
    assert all(p.grad is None for p in parameters)


def test_clipping_sees_the_gradients_of_all_passes() -> None:
    model = build()
    training_step = supernet_step(model, repeat(three()))
    training_step(data(), model).backward()
    whole = gradients_of(model)
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    model.zero_grad()
    training_step(data(), model).backward()
    found = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
    assert_close(
        gradients_of(model), {name: g * 0.01 / (norm + 1e-6) for name, g in whole.items()}, tolerance=1e-9
    )


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_backward_is_refused_and_adds_nothing(retain_graph: bool) -> None:
    model = build()
    loss = supernet_step(model, iter([three()]))(data(), model)
    loss.backward(retain_graph=retain_graph)
    once = gradients_of(model)
    with pytest.raises(RuntimeError, match=r"backward was called twice|backward through the graph a second"):
        loss.backward()
    assert_equal(gradients_of(model), once)


@pytest.mark.parametrize("step", [three(), three(distilled=True), three(parallel=True)])
def test_without_backward_no_gradient_changes(step: Step) -> None:
    model = build()
    marks = {name: torch.full_like(p, 7) for name, p in model.named_parameters() if "weight" in name}
    for name, mark in marks.items():
        model.get_parameter(name).grad = mark
    loss = supernet_step(model, iter([step]))(data(), model)
    assert loss.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is marks.get(name)
    assert all(bool((mark == 7).all()) for mark in marks.values())


@pytest.mark.parametrize("step", [three(), three(distilled=True), three(parallel=True)])
def test_frozen_parameters_get_no_gradient_and_change_no_other(step: Step) -> None:
    model = build()
    supernet_step(model, iter([step]))(data(), model).backward()
    expected = gradients_of(model)
    frozen = build()
    for name in ("a.weight", "bn.bias", "fc.weight"):
        frozen.get_parameter(name).requires_grad_(False)
        del expected[name]
    supernet_step(frozen, iter([step]))(data(), frozen).backward()
    assert_close(gradients_of(frozen), expected)


@pytest.mark.parametrize("step", [three(), three(distilled=True), three(parallel=True)])
def test_without_gradients_it_is_the_training_step_itself(step: Step) -> None:
    model, batch = build(), data()
    training_step = supernet_step(model, iter([step]))
    with torch.no_grad():
        loss = training_step(batch, model)
    assert not loss.requires_grad
    assert torch.equal(loss, cross_entropy(batch, model))
    assert training_step.taken == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_model_all_of_whose_parameters_are_frozen_has_a_loss_without_gradient() -> None:
    model = build().requires_grad_(False)
    loss = supernet_step(model, iter([three(distilled=True)]))(data(), model)
    assert not loss.requires_grad and loss > 0


# --- mixed precision ---------------------------------------------------------------------------------


def float32_batches() -> list[Any]:
    return [(images.float(), labels) for images, labels in (data(seed=seed) for seed in range(4))]


@pytest.mark.parametrize("rule_name", ["sandwich", "path_fair", "spfs", "parallel"])
def test_a_gradient_scaler_changes_no_weight(rule_name: str) -> None:
    """Its scale is a power of two, which float32 multiplies and divides by exactly."""

    def scaled(
        model: nn.Module, optimizer: torch.optim.Optimizer, step: SupernetStep, batches: list[Any]
    ) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(step(batch, model)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**14  # it grew twice, so no step was skipped

    final = [
        trained(loop, build().float(), float32_batches(), rule(rule_name, space_of()))
        for loop in (scaled, zero_before(True))
    ]
    assert_equal(*final)


def half_precision(batch: tuple[Tensor, Tensor], model: nn.Module, factor: float) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        logits = model(batch[0])
    return factor * F.cross_entropy(logits.float(), batch[1])


def test_small_gradients_of_all_passes_survive_half_precision() -> None:
    """They are computed at the scale that the scaler used in the step before."""
    factor = 1e-7
    exact, model = build(), build().float()
    images, labels = data()
    (factor * cross_entropy((images, labels), exact)).backward()
    space = space_of()
    surplus = slice(space.smallest()["a"], None)  # channels that only the first of two passes trains
    expected = exact.a.weight.grad[surplus]
    step = Step((space.largest(), space.smallest()), distilled=True)
    training_step = supernet_step(model, repeat(step), functools.partial(half_precision, factor=factor))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    errors = []
    for _ in range(2):
        model.zero_grad()
        scaler.scale(training_step((images.float(), labels), model)).backward()
        found = model.a.weight.grad[surplus].double() / scaler.get_scale()
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] > 0.5  # nothing is known of a scaler yet
    assert errors[1] < 0.02


def test_an_overflow_in_half_precision_reaches_the_scaler() -> None:
    """Early passes too overflow to inf, so that the scaler skips the step instead of ruining the weights."""
    model = build().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images, labels = data()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step = supernet_step(
        model, iter([three(distilled=True)]), functools.partial(half_precision, factor=1e6)
    )
    scaler.scale(training_step((images.float(), labels), model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_equal({name: p.detach() for name, p in model.named_parameters()}, before)


def test_a_scaler_finds_a_scale_for_every_loss_that_ordinary_training_can_take() -> None:
    """A loss so large that gradients fit into float16 only if the scaler scales them down."""
    model = build().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    images, labels = data()
    for step in (Step((space_of().largest(),)), three()):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        training_step = supernet_step(model, repeat(step), functools.partial(half_precision, factor=2e4))
        scales = []
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(training_step((images.float(), labels), model)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[-1] == scales[-2], step


# --- memory ------------------------------------------------------------------------------------------


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Ledger:
    """Elements that graphs keep alive, now and at most."""

    def __init__(self) -> None:
        self.alive: WeakSet[Saved] = WeakSet()
        self.most = 0

    @property
    def elements(self) -> int:
        return sum(saved.tensor.numel() for saved in self.alive)

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an output with its graph would be a cycle
        self.alive.add(saved)
        self.most = max(self.most, self.elements)
        return saved


def kept(step: Step, training_step: Callable[..., Any] = cross_entropy) -> tuple[int, int]:
    """Elements alive when the step returns, and the most while it ran."""
    model, ledger = build(), Ledger()
    groups_of()  # not traced below
    with saved_tensors_hooks(ledger.pack, lambda saved: saved.tensor):
        output = supernet_step(model, iter([step]), training_step)(data(), model)
        alive = ledger.elements
        loss = output if isinstance(output, Tensor) else output["loss"]
        loss.backward()
        del loss, output
    assert ledger.elements == 0
    return alive, ledger.most


def with_logits(batch: tuple[Tensor, Tensor], model: nn.Module) -> dict[str, Tensor]:
    logits = model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}


@pytest.mark.parametrize("training_step", [cross_entropy, with_logits])
@pytest.mark.parametrize("distilled", [False, True])
def test_only_one_pass_keeps_its_activations(distilled: bool, training_step: Callable[..., Any]) -> None:
    space = space_of()
    largest, smallest = (kept(Step((w,)), training_step) for w in (space.largest(), space.smallest()))
    alive, most = kept(three(distilled=distilled), training_step)
    logits = 8 * 12 * 10  # what a distillation loss keeps
    assert smallest[0] < 0.8 * largest[0]
    assert alive <= smallest[0] + distilled * logits
    assert most <= largest[1] + distilled * logits


# --- what training steps return, and resuming ----------------------------------------------------------


def test_everything_but_the_loss_is_that_of_the_first_network() -> None:
    model, batch = build(), data()
    order = prefix_order(groups_of())
    expected = reference_loss(model, groups_of(), order, three(), *batch).detach()

    def returned(kind: type) -> Any:
        passes = count(1)

        def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Any:
            loss = cross_entropy(batch, model)
            if kind is dict:
                return {"loss": loss, "pass": next(passes), "name": "x"}
            return kind([loss, next(passes), "x"])

        return supernet_step(model, iter([three()]), training_step)(batch, model)

    mapping = returned(dict)
    assert mapping["pass"] == 1 and mapping["name"] == "x" and list(mapping) == ["loss", "pass", "name"]
    for sequence in (returned(tuple), returned(list)):
        assert list(sequence[1:]) == [1, "x"]
        torch.testing.assert_close(sequence[0].detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mapping["loss"].detach(), expected, rtol=1e-12, atol=0)


def test_positional_and_named_arguments_reach_the_training_step() -> None:
    model = build()
    calls: list[tuple[Any, Any]] = []

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return cross_entropy(args[0], model)

    batch = data()
    supernet_step(model, iter([three()]), training_step)(batch, 3, batch_idx=5)
    assert len(calls) == 3 and all(c == ((batch, 3), {"batch_idx": 5}) for c in calls)


def test_a_step_that_skips_what_was_taken_goes_on_as_if_never_stopped() -> None:
    def new() -> tuple[nn.Module, SupernetStep, list[int]]:
        model = build()
        space = space_of()
        pool = [space.sample(seeded(k)) for k in range(9)]
        step = supernet_step(model, spfs(space, draw_paths(dict.fromkeys(pool), seeded())))
        return model, step, widths_run(model)

    model, step, seen = new()
    for _ in range(5):
        step(data(), model)
    saved = step.state_dict()
    assert saved["taken"] == 5
    before = len(seen)
    for _ in range(6):
        step(data(), model)

    model, resumed, rest = new()
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved and rest == []
    for _ in range(6):
        resumed(data(), model)
    assert rest == seen[before:] and len(set(rest)) > 2
    assert resumed.state_dict() == step.state_dict()
    assert resumed.taken == 11


def test_steps_cannot_be_taken_back() -> None:
    model = build()
    step = supernet_step(model, repeat(three()))
    step(data(), model)
    step.load_state_dict(step.state_dict())
    with pytest.raises(TrainingError, match="1 steps are taken already, more than the 0 to go on after"):
        step.load_state_dict({"taken": 0, "last": []})
    assert step.taken == 1


@pytest.mark.parametrize("steps", [repeat(Step((Widths({"a": 3}),))), [three()]])
def test_a_rule_that_draws_other_networks_does_not_go_on(steps: Any) -> None:
    model = build()
    step = supernet_step(model, repeat(three()))
    step(data(), model)
    step(data(), model)
    with pytest.raises(TrainingError, match="draws other networks than before"):
        supernet_step(build(), steps).load_state_dict(step.state_dict())


# --- recomputed activations --------------------------------------------------------------------------


def recomputing(use_reentrant: bool | None) -> Net:
    """A residual block whose activations are recomputed in the backward pass, unless given None."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).relu()

        def block(x: Tensor) -> Tensor:
            return net.b(net.bn(net.a(x)).relu())

        y = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
        return head(net, x + y)

    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4)
    net = Net(forward, stem=conv(3, 6), a=conv(6, 4), bn=bn, b=conv(4, 6), fc=nn.Linear(6, 10))
    return net.double()


def recomputed_gradients(use_reentrant: bool | None, step: Step) -> Gradients:
    net = recomputing(use_reentrant)
    groups = find_channel_groups(recomputing(None).eval(), data()[0])
    supernet = Supernet(net, groups, prefix_order(groups))
    step_loss(supernet, step, lambda: cross_entropy(data(), net)).backward()
    return gradients_of(net)


FULL, THIN, THIN_STEM = Widths({"stem": 6, "a": 4}), Widths({"stem": 6, "a": 2}), Widths({"stem": 3, "a": 4})


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "networks", [(THIN,), (THIN_STEM,), (FULL, THIN), (THIN, FULL), (FULL, THIN, THIN_STEM)]
)
def test_activations_are_recomputed_at_the_widths_of_their_pass(
    networks: tuple[Widths, ...], parallel: bool
) -> None:
    step = Step(networks, parallel=parallel)
    assert_close(recomputed_gradients(False, step), recomputed_gradients(None, step))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        recomputed_gradients(True, step)


def test_parameters_outside_of_the_model_are_trained_by_every_pass() -> None:
    model, batch, order = build(), data(), prefix_order(groups_of())
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]) * temperature, batch[1])

    supernet_step(model, iter([three()]), training_step)(batch, model).backward()
    found = temperature.grad
    temperature.grad = None
    for widths in three().networks:
        training_step(batch, narrow(model, groups_of(), order, widths)).backward()
    torch.testing.assert_close(found, temperature.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [three(), three(distilled=True), three(parallel=True), Step((THIN,))])
def test_a_hook_of_a_parameter_sees_the_gradient_of_the_whole_step_once(step: Step) -> None:
    if step.networks == (THIN,):
        step = Step((space_of().smallest(),))
    plain, hooked, calls = build(), build(), []
    supernet_step(plain, iter([step]))(data(), plain).backward()
    for parameter in hooked.parameters():
        parameter.register_hook(lambda gradient: calls.append(1) or gradient / 2)
    supernet_step(hooked, iter([step]))(data(), hooked).backward()
    assert len(calls) == len(list(hooked.parameters()))
    assert_close(gradients_of(hooked), {name: g / 2 for name, g in gradients_of(plain).items()})


@pytest.mark.parametrize("classes", [1, None])
def test_outputs_without_classes_are_not_distilled(classes: int | None) -> None:
    model, step = build(), three(distilled=True)

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return model(batch[0]).square().mean()

    shape = (slice(None), slice(1)) if classes else (slice(None), 0)
    model.register_forward_hook(lambda _, args, output: output[shape])
    with pytest.raises(TrainingError, match="logits"):
        supernet_step(model, iter([step]), training_step)(data(), model)


def test_unnamed_outputs_are_not_guessed() -> None:
    with pytest.raises(TrainingError, match="under the name 'logits'"):
        logits_of({"embedding": torch.zeros(2, 8), "prediction": torch.zeros(2, 5)})
    with pytest.raises(TrainingError, match="cannot distil outputs of shape"):
        kl_divergence(torch.zeros(2, 7, 5), torch.zeros(2, 7, 5))


def test_a_loss_for_each_sample_is_refused() -> None:
    model = build()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(TrainingError, match="must return a loss: a scalar"):
        supernet_step(model, iter([three()]), training_step)(data(), model)
