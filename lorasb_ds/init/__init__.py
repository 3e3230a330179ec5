"""The init of LoRA-SB: gradients, their update, its sharded SVD, the factors A, B and R.

`initialize` is the whole; `gradients` and `segments` stream weight gradients into row shards;
`update_rules` takes an optimizer's first step; `sharded_svd` and `lanczos` decompose it exactly;
`factors` and `step_size` fill the layers; `basis` stores the result.
Imports `adapters` and what is below it.
"""
