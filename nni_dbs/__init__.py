"""Channel pruning by width search, as pruners of Microsoft NNI 3.0.

Importing this package is cheap: every public name loads its module on first use, and only those that need
NNI import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nni_dbs.cost import Budget as Budget
    from nni_dbs.cost import FlopsCost as FlopsCost
    from nni_dbs.cost import ParamsCost as ParamsCost
    from nni_dbs.latency import LatencyCost as LatencyCost
    from nni_dbs.plugin.architecture import DMCPPruner as DMCPPruner
    from nni_dbs.plugin.architecture import DSAPruner as DSAPruner
    from nni_dbs.plugin.architecture import TASPruner as TASPruner
    from nni_dbs.plugin.job import experiment as experiment
    from nni_dbs.plugin.nas import WidthModelSpace as WidthModelSpace
    from nni_dbs.plugin.pruner import UniformPruner as UniformPruner
    from nni_dbs.plugin.searching import RandomPruner as RandomPruner
    from nni_dbs.plugin.slimming import AutoSlimPruner as AutoSlimPruner
    from nni_dbs.plugin.strategy import DBSStrategy as DBSStrategy
    from nni_dbs.plugin.strategy import DMCPStrategy as DMCPStrategy
    from nni_dbs.plugin.strategy import DSAStrategy as DSAStrategy
    from nni_dbs.plugin.strategy import EvolutionStrategy as EvolutionStrategy
    from nni_dbs.plugin.strategy import TASStrategy as TASStrategy
    from nni_dbs.plugin.supernets import DBSPruner as DBSPruner
    from nni_dbs.plugin.supernets import EvolutionPruner as EvolutionPruner
    from nni_dbs.plugin.supernets import PSENetPruner as PSENetPruner
    from nni_dbs.plugin.tuner import WidthTuner as WidthTuner
    from nni_dbs.projection import project as project
    from nni_dbs.result import load_pruned as load_pruned
    from nni_dbs.slimmable import Slimmable as Slimmable
    from nni_dbs.space import Widths as Widths
    from nni_dbs.space import WidthSpace as WidthSpace
    from nni_dbs.steps import SupernetStep as SupernetStep
    from nni_dbs.supernet import Supernet as Supernet

_MODULES = {
    "Budget": "nni_dbs.cost",
    "FlopsCost": "nni_dbs.cost",
    "ParamsCost": "nni_dbs.cost",
    "LatencyCost": "nni_dbs.latency",
    "AutoSlimPruner": "nni_dbs.plugin.slimming",
    "DBSPruner": "nni_dbs.plugin.supernets",
    "EvolutionPruner": "nni_dbs.plugin.supernets",
    "DMCPPruner": "nni_dbs.plugin.architecture",
    "DSAPruner": "nni_dbs.plugin.architecture",
    "TASPruner": "nni_dbs.plugin.architecture",
    "PSENetPruner": "nni_dbs.plugin.supernets",
    "RandomPruner": "nni_dbs.plugin.searching",
    "UniformPruner": "nni_dbs.plugin.pruner",
    "DBSStrategy": "nni_dbs.plugin.strategy",
    "DMCPStrategy": "nni_dbs.plugin.strategy",
    "DSAStrategy": "nni_dbs.plugin.strategy",
    "EvolutionStrategy": "nni_dbs.plugin.strategy",
    "TASStrategy": "nni_dbs.plugin.strategy",
    "WidthModelSpace": "nni_dbs.plugin.nas",
    "WidthTuner": "nni_dbs.plugin.tuner",
    "experiment": "nni_dbs.plugin.job",
    "load_pruned": "nni_dbs.result",
    "project": "nni_dbs.projection",
    "Slimmable": "nni_dbs.slimmable",
    "WidthSpace": "nni_dbs.space",
    "Widths": "nni_dbs.space",
    "Supernet": "nni_dbs.supernet",
    "SupernetStep": "nni_dbs.steps",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nni_dbs' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != "pytorch_lightning":
            raise
        raise ImportError(f"NNI's NAS, and {name}, need Lightning: pip install 'nni-dbs[nas]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
