"""The one entry point: reads a Hydra config and runs the recipe it names.

python train.py                                   runs configs/pretrain.yaml
python train.py --config-name NAME                another recipe
python train.py model=hybrid_340m train.steps=100 changes the config
python train.py --help                            the groups and every key
accelerate launch train.py parallel=data          on several devices
"""

import importlib
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import hydra  # noqa: E402
from hydra._internal.utils import get_args_parser  # noqa: E402

from qlatrain.command_line import check, exit_with, register_schemas, to_schema  # noqa: E402

CONFIGS = ROOT / "configs"


@hydra.main(version_base="1.3", config_path="configs", config_name="pretrain")
def run(config) -> None:
    config = to_schema(config)
    try:
        importlib.import_module(f"recipes.{config.recipe}").main(config)
    except Exception as error:
        if not is_users(error):
            raise
        exit_with(str(error), 1)


def is_users(error: Exception) -> bool:
    """A mistake we recognised and told in one sentence; anything else is a bug and keeps its traceback."""
    if os.environ.get("QLATRAIN_TRACEBACK") or not isinstance(error, (ValueError, RuntimeError)):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = any(raised_in.is_relative_to(ROOT / part) for part in ("qlatrain", "recipes", "kernels"))
    return ours and (isinstance(error, ValueError) or type(error) is not RuntimeError)


def main() -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its whole traceback
    register_schemas()
    asked = get_args_parser().parse_args()
    if not (asked.help or asked.hydra_help or asked.info or asked.multirun or asked.shell_completion):
        try:
            check(CONFIGS, asked.config_name or "pretrain", asked.overrides)
        except ValueError as error:
            exit_with(str(error), 2)
    run()


if __name__ == "__main__":
    main()
