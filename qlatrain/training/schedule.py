"""The learning rate of a step, as a factor on the peak rate: a function of the step number alone."""

import math

from qlatrain.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor for step `step` (from 0) of a run of `steps`.

    Linear warm-up from 1/warmup_steps to 1, then
    - cosine: half a cosine from 1 to `final` (Loshchilov & Hutter 2017);
    - wsd: 1 until the last `decay_fraction` of the run, then linear to `final` (Hu et al. 2024, MiniCPM).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    last = max(steps - 1, 1)
    if config.name == "cosine":
        start, shape = min(config.warmup_steps, last), lambda done: 0.5 * (1 + math.cos(math.pi * done))
    else:
        start, shape = max(config.warmup_steps, round(steps * (1 - config.decay_fraction))), lambda done: 1 - done
    done = min(max((step - start) / max(last - start, 1), 0.0), 1.0)
    return config.final + (1 - config.final) * shape(done)
