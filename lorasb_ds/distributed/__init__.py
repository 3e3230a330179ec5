"""DeepSpeed, this process's device, and collectives: everything that knows of other ranks.

- `zero`: the process group, the engine, and parameters that ZeRO-3 may have sharded (gather, fill).
- `optimizer_state`, `masters`: the optimizer state and the flat fp32 masters inside an engine.
- `matrix_optimizer`: Adafactor and Muon on masters that ZeRO cuts into flat parts.
- `failures`: what one rank raises, raised on all.
- `sequence_parallel`: rows that neighbouring ranks compute together (DeepSpeed's Ulysses).
- `ds_config_check`: DeepSpeed's own check of a ds_config.
- `accelerator`: this process's device, its memory and its clock.
- `collectives`: row ranges of a sharded matrix; all-reduce, reduce, broadcast and gather.

The only wing that imports deepspeed. Imports `config`, `system`, `errors`.
"""
