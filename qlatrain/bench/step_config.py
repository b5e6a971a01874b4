"""The schema of `bench_step`."""

from dataclasses import dataclass, field

from qlatrain.bench.shapes import parse_batch
from qlatrain.checks import check_choice, check_values
from qlatrain.config import (
    AT_LEAST,
    CHOICES,
    KernelConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TrackConfig,
    validate_model,
    validate_step,
)

PEERS = ("fla", "transformers")


@dataclass
class StepOnCpuConfig:
    """What is measured in place of `model`, `bench.shape` and `train.mixed_precision` where there is no GPU."""

    model: str = "tiny"  # an option of the model group
    shape: str = "2x256"
    mixed_precision: str = "no"


@dataclass
class StepBenchConfig:
    shape: str = "2x4096"  # see bench/shapes.py; of packed documents each step has others
    peers: list[str] = field(default_factory=list)  # fla | transformers: measured beside ours
    steps: int = 20  # timed
    warmup: int = 5  # steps before, of which the first and the fifth are timed on their own
    profiled_steps: int = 3  # behind the timed ones, for the time by family of kernels; 0: none
    checkpoint_peers: bool = False  # activation checkpointing of peers, whatever ours does
    empty_caches: bool = False  # each model starts with nothing compiled, in folders that go away
    seed: int = 0
    cpu: StepOnCpuConfig = field(default_factory=StepOnCpuConfig)


@dataclass
class BenchStepConfig:
    recipe: str = "bench_step"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    train: StepConfig = field(default_factory=StepConfig)
    bench: StepBenchConfig = field(default_factory=StepBenchConfig)

    def validate(self) -> None:
        """Raises ValueError, one sentence naming the key, for values and combinations that cannot run."""
        check_values(self, STEP_CHOICES, STEP_AT_LEAST)
        validate_model(self.model)
        validate_step(self.train)
        bench = self.bench
        parse_batch(bench.shape, "bench.shape")
        parse_batch(bench.cpu.shape, "bench.cpu.shape")
        for peer in bench.peers:
            check_choice("bench.peers", peer, PEERS)
        if len(set(bench.peers)) < len(bench.peers):
            raise ValueError(f"bench.peers=[{', '.join(bench.peers)}] holds one twice: leave it out")
        if bench.peers and self.optim.name != "adamw":
            raise ValueError(f"optim.name={self.optim.name} with bench.peers: peers take AdamW, use optim=adamw")


_SHARED = ("model.", "optim.", "kernel.", "track.", "train.mixed_precision")
STEP_CHOICES = {key: options for key, options in CHOICES.items() if key.startswith(_SHARED)} | {
    "bench.cpu.mixed_precision": CHOICES["train.mixed_precision"],
}
STEP_AT_LEAST = {key: least for key, least in AT_LEAST.items() if key.startswith(_SHARED)} | {
    "bench.steps": 1,
    "bench.warmup": 5,
    "bench.profiled_steps": 0,
}
