"""What a run needs, from sizes alone: bytes held and messages sent, under every strategy.

`strategies.plan` compares the ways to hold a base on a cluster; `footprint` counts memory;
`model_shape` knows sizes by a config.json; `placement` what a ds_config makes of them.
Imports `config`, `system`, `errors`. Torch-free.
"""
