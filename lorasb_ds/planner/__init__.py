"""Predict what a run needs from sizes alone: memory and bytes sent, for every strategy.

`strategies.plan` compares the ways to hold a base on a cluster. `footprint.footprint` counts the
memory of a rank, `traffic.step_traffic` and `traffic.init_traffic` the bytes that it receives, and
`init_plan.plan_init` divides the init's layers into groups (`layer_groups`); `base_bytes`,
`activations`, `gathers` and `init_bytes` count parts of the footprint. They all read a
`ModelShape`, a `Placement` (how a ds_config holds a base) and a `Workload` (adapter and rows).
`config_shape` makes the shape from a config.json of the `families`, `known_models` has those of
published models.
Imports `config`, `system`, `errors`. Torch-free.
"""
