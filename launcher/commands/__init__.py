"""One file per verb of `lorasb`: its options and checks, and who does the work.

Imports `sweeps` and what is below it. Torch-free.
"""
