"""The base model: from files to sharded, quantized, frozen weights; its loss and generation.

`base` opens a base's files once, for everything that needs them: `checkpoint_files` reads the
safetensors headers, `stored_formats` finds and decodes weights in FP8 and MXFP4, `weight_map` finds
the stored tensors that make each parameter, `tokenizer` reads the tokenizer, whose
`tokenizer_files` accompany adapters. `loading`,
`streaming` and `tensor_reader` load the weights, one tensor at a time; `quantization` packs them to
4 and 8 bits. `linear_layers` finds the layers that get an adapter, `experts` makes layers of the
experts of MoE blocks, `shape` gives the sizes of all of them to the planner. `tables` compares rows
with the embeddings, `packing` tests whether packed rows stay apart, `sequence_parallel` whether
rows can be computed in pieces; `loss` and `generation` run the
model, `classification` one with a classification head, whose predictions `row_scores` judges.
Imports `data`, `distributed`, `planner` and what is below them.
"""
