"""Write what a run leaves on disk, and read it again.

`output_dir.output_dir` prepares the folder and locks it. `run_log.RunLog` writes rows of numbers to
files, by `tracking` to trackers and by `progress` to the console; `profiler` profiles steps.
`checkpoint` writes and finds checkpoints. `followed_log` follows another process's rows. `history`
reads the rows back, `plots` draws them, `compare` puts several runs side by side, and `result` is
what a program gets of one.
Imports `data`, `distributed`, `planner` and what is below them.
"""
