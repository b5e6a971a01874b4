"""What stands beside the weights of a checkpoint for those who serve it, and is carried along as it is."""

import shutil
from pathlib import Path

NAMES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def copy_serving_files(source: str | Path, folder: str | Path) -> None:
    """Copies those of NAMES that `source` has, where `folder` has none; the tokenizer is its own matter."""
    for name in NAMES:
        if (Path(source) / name).is_file() and not (Path(folder) / name).exists():
            shutil.copyfile(Path(source) / name, Path(folder) / name)
