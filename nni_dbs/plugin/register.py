"""Names in NNI's registry of tuners: `tuner: {name: DBS}` in a configuration for `nnictl`.

NNI keeps its registry for each Python environment; nothing of pip's installation reaches it, so it is
`nni-dbs register` that makes the names known.
"""

from __future__ import annotations

from pathlib import Path

import nni
import yaml
from nni.runtime.config import get_config_file
from nni.tools.package_utils import AlgoMeta, get_algo_meta, register_algo_meta, unregister_algo_meta

from nni_dbs.errors import ConfigError

NAMES = {
    "DBS": "dbs",
    "DBSEvolution": "evolution",
    "DBSGuidedEvolution": "guided_evolution",
    "DBSRandom": "random",
}
_CLASS = "nni_dbs.plugin.tuner.WidthTuner"


def register() -> Path:
    """Makes `NAMES` known to NNI, or brings them up to date; returns the file that it wrote.

    Raises:
        ConfigError: Another package has a tuner of this name, or the registry cannot be used.
    """
    path = _registry()
    for name in NAMES:
        known = get_algo_meta(name)
        if known is not None and known.class_name != _CLASS:
            raise ConfigError(
                f"NNI knows another tuner {name!r} ({known.class_name}): nnictl algo unregister {name}"
            )
    for name, searcher in NAMES.items():
        described = {
            "builtinName": name,
            "className": _CLASS,
            "classArgs": {"searcher": searcher},
            "classArgsValidator": f"{_CLASS}Validator",
            "nniVersion": nni.__version__,
        }
        register_algo_meta(AlgoMeta.load(described, "tuner"))
    return path


def unregister() -> Path:
    """Takes `NAMES` out of NNI's registry, where they are there; returns its file."""
    path = _registry()
    for name in NAMES:
        known = get_algo_meta(name)
        if known is not None and known.class_name == _CLASS:
            unregister_algo_meta(name)
    return path


def _registry() -> Path:
    try:
        path = get_config_file("registered_algorithms.yml")
        get_algo_meta("DBS")  # which reads it
        path.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"cannot write NNI's registry {error.filename}: {error.strerror}; set NNI_CONFIG_DIR"
        ) from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"NNI's registry is damaged: {' '.join(str(error).split())}; delete it") from error
    return path
