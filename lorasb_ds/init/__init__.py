"""The init phase: gradients, the optimizer's first step, its sharded SVD, the factors A, B and R.

- `initialize`: the whole phase, for every method of `config.methods`.
- `gradients`, `gradient_shards`, `segments`: average gradients, one layer at a time, as row shards.
- `update_rules`: what an optimizer's first step makes of a gradient.
- `decomposition`, `sharded_svd`, `lanczos`: exact truncated SVD of row-sharded updates.
- `experts`, `batched_svd`: the experts of a projection, each decomposed by the rank that owns it.
- `factors`, `step_size`: fill the layers' factors, and choose eta.
- `init_report`, `basis_file`, `basis`: what the init found; the factors on disk; loading them.
- `rank_allocation`: ranks by layer, of the spectra in a basis.

Imports `adapters` and what is below it.
"""
