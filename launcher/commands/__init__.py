"""One file per verb of `lorasb`: its options and checks; the work is done by others.

Imports `sweeps` and what is below it. Torch-free.
"""
