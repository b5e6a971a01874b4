"""What a run measures of itself, and where it shows it.

- `flops`: floating-point operations of a training step, by layer type
- `hardware`: peak rate of the device, and the environment a run ran in
- `throughput`: tokens per second, MFU, time left
- `kernel_times`: where the time of a step goes, by family of kernels
- `bigram`: the byte-pair baseline to print beside a model's bits per byte
- `recorder`: `metrics.jsonl`, the row every other file here reads
- `plots`: `loss.png`
- `console`: the lines a person reads
- `trackers`: wandb through accelerate

Nothing is imported here: a program that only counts FLOPs should not load matplotlib.
"""
