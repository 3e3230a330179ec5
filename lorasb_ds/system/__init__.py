"""Files, memory, signals and units of the machine.

Atomic files and their digests (`files`), safetensors written whole or tensor by tensor
(`safetensors_writer`), host memory (`host_memory`), stop signals and exit statuses (`signals`),
bytes (`units`), one job for each folder (`folder_lock`), limits for what others have written
(`limits`). Imports `errors` only. Torch-free, except
for `safetensors_writer`.
"""
