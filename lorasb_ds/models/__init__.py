"""The base model: from files to sharded, quantized, frozen weights; its loss and generation.

`loading` and `streaming` bring stored tensors to where they are used, one at a time;
`checkpoint_files` and `weight_map` know the files; `quantization` packs weights to 4 and 8 bits;
`linear_layers` finds the layers that get an adapter; `loss` and `generation` run the model.
Imports `data`, `distributed`, `planner` and what is below them.
"""
