"""The command `nni-dbs`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nni_dbs.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch import nn

    from nni_dbs.config import Config
    from torch_pruning_adapters.calls import Inputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, or 2 with one line on stderr for a mistake of the user's."""
    options = _parse(arguments)
    if not options.debug:
        warnings.simplefilter("ignore")
    import torch  # noqa: F401  sets its loggers' levels

    if not options.debug:
        logging.getLogger("torch").setLevel(logging.ERROR)
    from torch_pruning_adapters import UnsupportedModelError, WidthError

    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (UserError, UnsupportedModelError, WidthError) as error:
        if options.debug:
            raise
        print(f"nni-dbs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stderr.close()
    except Exception as error:
        if options.debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"nni-dbs: unexpected {text}; --debug shows where", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere behind the configuration, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = options.command in (_prune, _prepare)
    unknown = [text for text in rest if not takes_overrides or text.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nni-dbs", description="Channel pruning by width search.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show warnings, and tracebacks of mistakes")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    for name, command, text in (
        ("prune", _prune, "train, prune, fine-tune and export as a configuration says"),
        ("prepare", _prepare, "train as prune does, and write an experiment for nnictl that does the search"),
    ):
        sub = add(name, command, text)
        sub.add_argument("config", metavar="CONFIG", help="YAML file")
        sub.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="such as budget=300M train.epochs=2"
        )
        sub.add_argument("--out", type=Path, help="output directory (default: runs/NAME-METHOD)")
        sub.add_argument("--resume", action="store_true", help="continue an interrupted run")

    for name, command, text in (
        ("groups", _groups, "list a model's channel groups, frozen ones with the reason"),
        ("cost", _cost, "count a model's FLOPs and parameters, at full or given widths"),
    ):
        sub = add(name, command, text)
        sub.add_argument("model", metavar="MODEL", help="torchvision name or package.module:callable")
        sub.add_argument("--input", default="3x224x224", metavar="CxHxW", help="shape of one sample")
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        if name == "cost":
            sub.add_argument("--widths", type=Path, metavar="FILE", help="a widths.yaml")

    evaluate = add("evaluate", _evaluate, "test accuracy of an exported model on its run's data")
    evaluate.add_argument("directory", type=Path, metavar="DIR")
    evaluate.add_argument("--json", action="store_true", help="machine-readable output")
    plot = add("plot", _plot, "draw the pictures of a run again")
    plot.add_argument("directory", type=Path, metavar="DIR")
    register = add("register", _register, "make our tuners, such as DBS and DBSEvolution, known to nnictl")
    register.add_argument("--remove", action="store_true", help="take them out again")
    add("methods", _methods, "list the methods and when to use which")
    return parser


def _config_and_out(options: argparse.Namespace) -> tuple[Config, Path]:
    from nni_dbs.config import load_config

    config = load_config(options.config, options.overrides)
    name = Path(options.config).resolve().parent.name
    return config, options.out or Path("runs") / f"{name}-{config.method}"


def _prepare(options: argparse.Namespace) -> None:
    config, out = _config_and_out(options)
    from nni_dbs.plugin.job import prepare

    path = prepare(config, out, options.resume, options.quiet)
    print(f"nni-dbs register && nnictl create --config {path} --port {config.experiment.port}")
    print(f"then: nni-dbs prune {out / 'config.yaml'} --out {out} --resume")


def _register(options: argparse.Namespace) -> None:
    from nni_dbs.plugin.register import NAMES, register, unregister

    path = unregister() if options.remove else register()
    print(f"{', '.join(NAMES)} {'removed from' if options.remove else 'registered in'} {path}")


def _prune(options: argparse.Namespace) -> None:
    config, out = _config_and_out(options)
    from nni_dbs.plugin.job import prune
    from nni_dbs.report import HEADER, cells, table

    rows = prune(config, out, options.resume, options.quiet)
    print(table(HEADER, [cells(row) for row in rows]))
    print(f"\n{out / 'report.md'}")


def _groups(options: argparse.Namespace) -> None:
    from nni_dbs.report import table
    from torch_pruning_adapters import find_channel_groups

    groups = find_channel_groups(*_model_and_input(options))
    if options.json:
        print(json.dumps([g.to_dict() for g in groups]))
        return
    rows = [
        (
            g.name,
            str(g.size),
            str(g.step),
            str(len(g.producers)),
            str(len(g.consumers)),
            g.frozen or "",
        )
        for g in groups
    ]
    print(table(("group", "channels", "step", "producers", "consumers", "frozen because"), rows))
    print(f"\n{sum(g.frozen is None for g in groups)} of {len(groups)} groups can be cut")


def _cost(options: argparse.Namespace) -> None:
    from nni_dbs.cost import FlopsCost, ParamsCost
    from nni_dbs.report import table
    from nni_dbs.result import load_widths
    from torch_pruning_adapters import find_channel_groups

    model, example = _model_and_input(options)
    widths = load_widths(options.widths) if options.widths else {}
    groups = find_channel_groups(model, example)
    costs = {"flops": FlopsCost(model, example, groups), "params": ParamsCost(model, groups)}
    found = {kind: {"full": cost.full, "cost": cost(widths)} for kind, cost in costs.items()}
    if options.json:
        print(json.dumps(found))
        return
    rows = [
        (kind, f"{c['full']:,}", f"{c['cost']:,}", f"{c['cost'] / c['full']:.2%}")
        for kind, c in found.items()
    ]
    print(table(("", "full", "at these widths" if options.widths else "at full width", "share"), rows))


def _evaluate(options: argparse.Namespace) -> None:
    from nni_dbs.config import load_config
    from nni_dbs.plugin.job import load_splits, resolve_device
    from nni_dbs.result import load_pruned
    from nni_dbs.training import accuracy

    model = load_pruned(options.directory)
    config = load_config(options.directory / "config.yaml")
    device = resolve_device(config.device)
    found = accuracy(model.to(device), load_splits(config).test, device=device, workers=config.workers)
    print(json.dumps({"test_accuracy": found}) if options.json else f"test accuracy {found:.2f} %")


def _plot(options: argparse.Namespace) -> None:
    from nni_dbs.plugin.job import replot

    for path in replot(options.directory):
        print(path)


def _methods(options: argparse.Namespace) -> None:
    import inspect

    from nni_dbs.plugin.job import METHODS

    for name, pruner in METHODS.items():
        print(f"{name}  ({pruner.__name__})")
        summary = (inspect.getdoc(pruner) or "").split("\nArgs:")[0].strip()
        print("    " + summary.replace("\n", "\n    ") + "\n")


def _model_and_input(options: argparse.Namespace) -> tuple[nn.Module, Inputs]:
    from nni_dbs.models import model_and_input

    try:
        shape = [int(n) for n in options.input.lower().split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input: expected a shape such as 3x224x224, not {options.input!r}")
    return model_and_input(options.model, shape)


if __name__ == "__main__":
    sys.exit(main())
