"""The schema of bench_step, what it refuses, and that its config fits it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from qlatrain.bench.step_config import STEP_AT_LEAST, STEP_CHOICES, BenchStepConfig
from qlatrain.command_line import all_keys, check, register_schemas, to_schema

CONFIGS = Path(__file__).parent.parent.parent / "configs"

register_schemas()


def composed(*overrides: str) -> BenchStepConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_schema(compose("bench_step", list(overrides)))


def test_defaults_are_the_reference_measurement():
    config = composed()
    config.validate()
    assert isinstance(config, BenchStepConfig) and config.run.dir == "runs/bench-step"
    assert config.model.name == "hybrid_1b6" and config.bench.shape == "2x4096" and config.bench.peers == []
    assert config.train.mixed_precision == "bf16" and config.optim.name == "adamw"
    assert config.bench.cpu.model == "tiny" and config.bench.cpu.mixed_precision == "no"


def test_keys():
    keys = set(all_keys(BenchStepConfig))
    assert {"model.hidden_size", "train.compile", "bench.cpu.shape", "kernel.gated_delta_rule"} <= keys
    assert (set(STEP_CHOICES) | set(STEP_AT_LEAST)) <= keys
    # what a step has to do with, and no more
    assert not keys & {"train.steps", "train.micro_batch_size", "data.source", "checkpoint.every"}


REFUSED = [
    (["train.steps=3"], "train.steps is not a config key"),
    (["bench.stepz=3"], "bench.stepz is not a config key; did you mean bench.steps?"),
    (["bench.warmup=4"], "bench.warmup=4 is below 5, the least it can be"),
    (["bench.steps=0"], "bench.steps=0 is below 1, the least it can be"),
    (["bench.shape=2x4096 16/32"], "bench.shape=2x4096 16/32 is no batch: write B×T or T packedN"),
    (["bench.shape=4 packed9"], "bench.shape=4 packed9: 9 documents need at least 9 tokens"),
    (["bench.cpu.shape=0x9"], "bench.cpu.shape=0x9 has a size of 0"),
    (["bench.peers=fla"], "bench.peers is a list: write bench.peers=[first,second]"),
    (["bench.peers=[flame]"], "bench.peers=flame is not one of fla, transformers; did you mean fla?"),
    (["bench.peers=[fla,fla]"], "bench.peers=[fla, fla] holds one twice: leave it out"),
    (["bench.peers=[fla]", "optim=muon"], "optim.name=muon with bench.peers: peers take AdamW, use optim=adamw"),
    (["model.layer_pattern=[gdn,att]"], "model.layer_pattern holds att, which is not one of gdn, attn; did you mean"),
    (["train.mixed_precision=fp8"], "train.mixed_precision=fp8 is not one of no, bf16"),
    (["bench.cpu.mixed_precision=fp8"], "bench.cpu.mixed_precision=fp8 is not one of no, bf16"),
    (["train.max_grad_norm=0"], "train.max_grad_norm=0.0 is not above 0; use inf not to clip"),
    (["recipe=pretrain"], "recipe=pretrain has other keys than this config: use --config-name pretrain"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_what_cannot_run(overrides, message):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "bench_step", overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
