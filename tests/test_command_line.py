"""train.py as it is called: help, and the sentence for each mistake. In a run: recipes/test_pretrain_bad_input.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlatrain.command_line import check, register_schemas

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
GROUPS = ("data", "kernel", "model", "optim", "parallel", "schedule", "track")

register_schemas()


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_train_is_short():
    assert len((ROOT / "train.py").read_text().splitlines()) < 80


def test_help():
    done = train("--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    for group in GROUPS:
        options = ", ".join(sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))
        assert f"{group}: {options}" in lines
        assert f"{group}:" in lines  # its keys
    assert "  global_batch_size: 4" in lines and "Examples:" in lines


def test_cfg_job():
    done = train("--cfg", "job", "train.steps=77", "optim=adamw")
    assert done.returncode == 0 and done.stderr == ""
    config = yaml.safe_load(done.stdout)
    assert set(GROUPS) < config.keys()
    assert config["train"]["steps"] == 77 and config["optim"]["name"] == "adamw"


def test_a_mistake_ends_with_two_and_one_sentence():
    done = train("train.stepz=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: train.stepz is not a config key; did you mean train.steps?\n"


def test_nothing_is_written_before_the_config_is_right(tmp_path):
    train(f"run.dir={tmp_path}/run", "train.steps=0")
    assert list(tmp_path.iterdir()) == []


MODELS = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
MISTAKES = [
    (["train.stepz=3"], "train.stepz is not a config key; did you mean train.steps?"),
    (["trian.steps=3"], "trian is not a config key; did you mean train?"),
    (["+train.stepz=3"], "train.stepz is not a config key; did you mean train.steps?"),
    (["++train.stepz=3"], "train.stepz is not a config key; did you mean train.steps?"),
    (["+zzz=3"], "zzz is not a config key"),
    (["optim.momentum=0.9"], "optim.momentum is not a config key; did you mean optim.muon_momentum?"),
    (["train.steps=many"], "train.steps=many is not of type integer"),
    (["train.steps=1.5"], "train.steps=1.5 is not of type integer"),
    (["train.steps="], "train.steps= is not of type integer"),
    (["optim.betas=[0.9,x]"], "optim.betas[1]=x is not of type float"),
    (["train.compile=maybe"], "train.compile=maybe is not of type bool"),
    (["train.steps=null"], "train.steps cannot be null"),
    (["train.steps=???"], "train.steps has no value: give it on the command line or in the config file"),
    (
        ["model=tinny"],
        f"model=tinny is not there: choose one of {', '.join(MODELS)}; did you mean tiny?",
    ),
    (["schedule=cosin"], "schedule=cosin is not there: choose one of cosine, wsd; did you mean cosine?"),
    (["models=tiny"], "models is not a config key; did you mean model?"),
    (
        ["recipe=pretran"],
        "recipe=pretran is not there: choose one of pretrain, finetune, export, bench_kernels, bench_step; "
        "did you mean pretrain?",
    ),
    (["recipe=bench_kernels"], "recipe=bench_kernels has other keys than this config: use --config-name bench_kernels"),
    (["train.steps"], "train.steps cannot be read: write key=value, in quotes where it holds brackets or spaces"),
    (["data.files=[a"], "data.files=[a cannot be read: write key=value, in quotes where it holds brackets or spaces"),
    (["run.name=${nope}"], "run.name: Interpolation key 'nope' not found"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(overrides) for overrides, _ in MISTAKES])
def test_every_mistake_in_one_sentence(overrides, message):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", overrides)
    assert str(caught.value) == message


def test_unknown_recipe_config():
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretran", [])
    options = "bench_kernels, bench_step, export, finetune, pretrain"
    assert str(caught.value) == f"--config-name pretran is not there: choose one of {options}; did you mean pretrain?"


@pytest.mark.parametrize("deleted", ["~model", "~train.steps"])
def test_deleting_a_key(deleted):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", [deleted])
    assert "\n" not in str(caught.value)
