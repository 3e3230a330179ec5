"""One job: started, watched, restarted, and ended with a status that is true.

`start` is the whole. `make_job` chooses a `LocalJob`, an `SshJob` or a `ByHandJob`, and `inputs`
looks at its model and rows where nothing is to be started yet (`--dry-run`); `command` makes
DeepSpeed's argument lists; `supervisor` watches the agents of all ranks, and `verdict` says why
a job has failed; `agent` is what DeepSpeed starts on every rank, beside its `worker_process`.
Imports `hosts` and what is below it. Torch-free.
"""
