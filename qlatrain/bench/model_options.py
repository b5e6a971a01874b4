"""A model by the name of its config."""

from pathlib import Path

from omegaconf import OmegaConf

from qlatrain.checks import nearest
from qlatrain.config import ModelConfig


def read_model(folder: Path, name: str, key: str) -> ModelConfig:
    """
    Args:
        folder: of model configs, one YAML for each.
        name: of one of them.
        key: that named it, such as `bench.from_model`.

    Raises:
        ValueError: there is no such model.
    """
    options = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in options:
        raise ValueError(f"{key}={name} is not there: choose one of {', '.join(options)}{nearest(name, options)}")
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(folder / f"{name}.yaml"))
    )
