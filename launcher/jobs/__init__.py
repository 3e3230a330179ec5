"""One job: its command, started, watched, and ended with a true status.

`start` runs a job and its restarts; `supervisor` watches the agents of all ranks; `agent` is what
DeepSpeed starts on every rank. Imports `hosts` and what is below it. Torch-free.
"""
