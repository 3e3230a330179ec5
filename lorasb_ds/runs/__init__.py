"""What a run leaves on disk, and how it is read again.

`output_dir` prepares the folder; `run_log`, `tracking` and `progress` write numbers to files,
trackers and the console; `checkpoint` writes and finds checkpoints; `history`, `plots` and
`compare` read them back. Imports `data`, `distributed`, `planner` and what is below them.
"""
