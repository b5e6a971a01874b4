"""From a command line to a checked config: what is wrong is told in one sentence, before anything starts."""

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlatrain.bench.config import BenchKernelsConfig
from qlatrain.bench.step_config import BenchStepConfig
from qlatrain.checks import nearest
from qlatrain.config import ExportConfig, FinetuneConfig, PretrainConfig

# one for each recipe: a dataclass with a method `validate`, which raises ValueError
SCHEMAS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "export": ExportConfig,
    "bench_kernels": BenchKernelsConfig,
    "bench_step": BenchStepConfig,
}


def register_schemas() -> None:
    """Makes each recipe's schema known to Hydra as `<recipe>_schema`, the base of `configs/<recipe>.yaml`."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def check(config_dir: Path, config_name: str, overrides: list[str]) -> None:
    """Composes and validates what Hydra is about to run.

    Raises:
        ValueError: one sentence that names the key and the nearest valid one.
    """
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            to_schema(compose(config_name, overrides)).validate()
    except (HydraException, OmegaConfBaseException) as error:
        known = all_keys(_schema_in(config_dir / f"{config_name}.yaml"))
        raise ValueError(one_sentence(error, config_dir, known)) from error


def to_schema(config):
    """The composed config as the dataclass of its recipe, every interpolation resolved."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value: give it on the command line or in the config file")
    schema = OmegaConf.get_type(config)
    known = all_keys(schema)
    for key in _keys(config):
        if key not in known:  # a key added with +key=value, which Hydra lets through
            raise ValueError(f"{key} is not a config key{nearest(key, known)}")
    if config.recipe not in SCHEMAS:
        recipes = ", ".join(SCHEMAS)
        raise ValueError(
            f"recipe={config.recipe} is not there: choose one of {recipes}{nearest(config.recipe, SCHEMAS)}"
        )
    if schema is not SCHEMAS[config.recipe]:
        raise ValueError(f"recipe={config.recipe} has other keys than this config: use --config-name {config.recipe}")
    return OmegaConf.to_object(config)


def _schema_in(config_file: Path) -> type:
    """The schema of the recipe that a config file names: what to look for nearest keys in when it does not compose."""
    recipe = OmegaConf.load(config_file).get("recipe") if config_file.is_file() else None
    return SCHEMAS.get(recipe, PretrainConfig)


def _keys(config, prefix: str = "") -> list[str]:
    """Every key of a composed config, such as `train.steps`."""
    keys = []
    for name in config:
        keys.append(prefix + name)
        if OmegaConf.is_dict(config._get_node(name)):
            keys += _keys(config[name], f"{prefix}{name}.")
    return keys


def one_sentence(error: Exception, config_dir: Path, known: list[str]) -> str:
    """What Hydra or OmegaConf found wrong, with the nearest valid name. known: every key that the config could have."""
    cause = error
    while isinstance(cause, ConfigCompositionException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    if isinstance(cause, OverrideParseException):
        return f"{cause.override} cannot be read: write key=value, in quotes where it holds brackets or spaces"
    if isinstance(cause, MissingConfigException):
        return _missing_config(cause, config_dir)
    text = " ".join(str(cause).split())
    key = getattr(cause, "full_key", None) or _first(r"full_key: (\S+)", text)
    if key and re.search(r"not in|is not in struct", text):
        return f"{key} is not a config key{nearest(key, known)}"
    value = re.search(r"Value '(.*?)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", text)
    if key and value:
        return f"{key}={value[1]} is not of type {value[2].lower()}"
    missing = _first(r"Missing mandatory value: (\S+)", text)
    if missing:  # of what another key is made from
        return f"{missing} has no value: give it on the command line or in the config file"
    if key and "ListConfig" in text:
        return f"{key} is a list: write {key}=[first,second]"
    if key and "not Optional" in text:
        return f"{key} cannot be null"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{key}: {lines[0]}" if key else lines[0]


def _missing_config(error: MissingConfigException, config_dir: Path) -> str:
    wanted = str(error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = wanted.rpartition("/")
    options = sorted(file.stem for file in (config_dir / group).glob("*.yaml"))
    what = f"{group}={name}" if group else f"--config-name {name}"
    return f"{what} is not there: choose one of {', '.join(options)}{nearest(name, options)}"


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key of a schema, such as `train.steps`."""
    keys = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += all_keys(hints[item.name], f"{prefix}{item.name}.")
    return keys


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def exit_with(message: str, code: int) -> None:
    """One sentence on standard error, and a non-zero end."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
