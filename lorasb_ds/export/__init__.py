"""Adapters on disk: read, truncated, combined, inspected, merged into a base.

`adapter_reader` reads any adapter a layer at a time; `to_peft`, `combine` and `inspection` compute
with it; `merge` (with `merge_plan`, `merge_folder`, `merge_file`) writes a whole model.
Imports `init` and what is below it.
"""
