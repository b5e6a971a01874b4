"""The schema of bench_kernels, what it refuses, and that its config fits it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from qlatrain.bench.config import BENCH_AT_LEAST, BENCH_CHOICES, BenchKernelsConfig
from qlatrain.bench.shapes import parse_shape
from qlatrain.command_line import all_keys, check, register_schemas, to_schema

CONFIGS = Path(__file__).parent.parent.parent / "configs"

register_schemas()


def composed(*overrides: str) -> BenchKernelsConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_schema(compose("bench_kernels", list(overrides)))


def test_defaults_are_valid():
    config = composed()
    config.validate()
    assert isinstance(config, BenchKernelsConfig) and config.run.dir == "runs/bench-kernels"
    shapes = [parse_shape(text) for text in config.bench.shapes]
    assert len(shapes) == 11 and all(shape.all_tokens in (8192, 32768) for shape in shapes)
    assert config.bench.backends == ["tilelang", "flash_qla", "fla", "torch"] and config.bench.baseline == "fla"
    assert config.bench.cpu.backends == ["torch"]


def test_keys():
    keys = set(all_keys(BenchKernelsConfig))
    assert {"bench.cpu.shapes", "bench.from_model", "track.backend", "compare"} <= keys
    assert (set(BENCH_CHOICES) | set(BENCH_AT_LEAST)) <= keys and "train.steps" not in keys


REFUSED = [
    (["train.steps=3"], "train is not a config key"),
    (["bench.shapez=[1x2 1/1]"], "bench.shapez is not a config key; did you mean bench.shapes?"),
    (["+bench.shapez=[1x2 1/1]"], "bench.shapez is not a config key; did you mean bench.shapes?"),
    (["bench.shapes=1x2"], "bench.shapes is a list: write bench.shapes=[first,second]"),
    (["bench.repeats=few"], "bench.repeats=few is not of type integer"),
    (["bench.repeats=0"], "bench.repeats=0 is below 1, the least it can be"),
    (["bench.documents=0"], "bench.documents=0 is below 1, the least it can be"),
    (["bench.dtype=bf16"], "bench.dtype=bf16 is not one of bfloat16, float16, float32; did you mean bfloat16?"),
    (["bench.shapes=[]"], "bench.shapes is empty: give a list such as [8x4096 16/32]"),
    (["bench.shapes=[1x2 1/1, 1x2 1/1 128/128]"], "bench.shapes holds a shape twice: leave one out"),
    (["bench.backends=[fla,auto]"], "bench.backends=auto is not one of tilelang, flash_qla, fla, torch"),
    (["bench.backends=[fla,fla]"], "bench.backends=[fla, fla] holds one twice: leave it out"),
    (["bench.directions=[]"], "bench.directions is empty: give a list of forward, backward, forward+backward"),
    (["bench.directions=[foward]"], "bench.directions=foward is not one of forward, backward, forward+backward; did"),
    (["bench.baseline=torhc"], "bench.baseline=torhc is not among bench.backends=[tilelang, flash_qla, fla, torch]"),
    (["bench.tokens=10", "bench.batch=3"], "bench.tokens=10 is not a multiple of bench.batch=3"),
    (["bench.batch=2", "bench.documents=3"], "bench.documents=3 packs one row: leave bench.batch=2 at 1"),
    (["bench.tokens=2", "bench.documents=3"], "bench.documents=3 is more than bench.tokens=2"),
    (["compare=[a.json]"], "compare holds 1 files: give two, compare=[before.json,after.json]"),
    (["recipe=pretrain"], "recipe=pretrain has other keys than this config: use --config-name pretrain"),
    (["track=wandbb"], "track=wandbb is not there: choose one of none, wandb; did you mean wandb?"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_what_cannot_run(overrides, message):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "bench_kernels", overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_config_of_a_users_own_is_held_against_the_keys_of_its_recipe(tmp_path):
    text = (CONFIGS / "bench_kernels.yaml").read_text().replace("  - track: none\n", "")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"did you mean bench.warmup\?"):
        check(tmp_path, "mine", ["bench.warmpu=3"])
