"""What a run is: its options, their defaults, and what they mean together.

`run_config.RunConfig` is all options, in the groups of the modules `*_options`; `resolve` makes one
from flags, an earlier run and the defaults, `classification` and `sequence_parallel` say what does
not work where rows are classified, or computed in pieces; `ds_config` fills DeepSpeed's "auto";
`methods` is the table of LoRA-SB and its relatives; `run_layout` names the files of a run's folder,
`overwriting` decides which folders may be replaced; `paths` finds the demo model and caches,
`stored_paths` makes paths absolute. A function that needs one group takes that group, not
RunConfig.
Imports `errors` only. Torch-free: the command line starts with it.
"""
