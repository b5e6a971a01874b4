"""How fast each backend of an operator is, and whether it is right: what `recipes/bench_kernels.py` is written in.
And how fast a whole training step is, ours beside peers': `recipes/bench_step.py`.

- `config`: the schema; `shapes`: what `8x4096 16/32` means; `model_options`: a model by the name of its config
- `operators`: what is known of an operator; `gated_delta_rule`: the first of them; `fla_dispatch`: a peer's habit
- `runs`: a forward and backward as they are checked and timed, eager or replayed from CUDA graphs
- `correctness`, `timing`, `memory`, `floors`: the four things that are measured
- `cold_start`: the first call of a fresh process
- `measure`: all of it for one shape
- `results`: rows, `results.json`, `results.csv`; `compare`: two of them side by side
- `report`, `plots`, `tracking`: console, pictures, wandb

Of a step:

- `step_config`: the schema; `step_job`: what one process is told, and its batches
- `step_models`: our model and the peers; `step_process`: measures one of them; `step_run`: starts that, and makes a row
- `step_results`, `step_report`, `step_plot`: rows and files, console, picture

Nothing is imported here: checking a config should not load torch.
"""
