"""DeepSpeed, its accelerator, and the collectives that the library uses.

`zero` and `accelerator` are the only modules that import deepspeed. `collectives` says which rows
of a matrix a rank holds; `masters` and `matrix_optimizer` work on ZeRO's flat fp32 masters.
Imports `config`, `system`, `errors`.
"""
