"""A training run, from its configuration to its adapter.

`from_python` is `lorasb_ds.train`, a run in the program's processes (`here`) or in ones of its own
(`launched`). `trainer` runs it from beginning to end, and `model_check` tries its model. `prepare`
checks everything that one process can check, with `adapter_plan`, `table_check`, `memory` and
`resume_check`; `init_phase` and `loop` are the two phases, and `held_out` evaluates between steps;
`training_run` is what they share; `rebase` makes the next basis; `resume` and `engine_state` save
and restore a run; `phases` and `out_of_memory` say what would take less.
Imports `init` and what is below it; `evaluation` neither imports it nor is imported by it.
"""
