"""What a run is: its options, their defaults, and what they mean together.

`run_config.RunConfig` holds the options; `resolve` makes one from flags, an earlier run and the
defaults; `ds_config` fills DeepSpeed's "auto"; `methods` is the table of LoRA-SB and its relatives;
`run_layout` names the files of a run's folder; `paths` finds the demo model and caches.
Imports `errors` only. Torch-free: the command line starts with it.
"""
