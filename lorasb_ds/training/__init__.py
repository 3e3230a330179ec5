"""A training run, from its configuration to its adapter.

`trainer` is the whole; `prepare` checks everything that one process can know; `init_phase` and
`loop` are its two phases; `resume` and `training_state` save and restore it; `memory` and
`out_of_memory` say what it needs and what would take less.
Imports `init` and what is below it; `evaluation` neither imports it nor is imported by it.
"""
