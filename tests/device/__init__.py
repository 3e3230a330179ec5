"""Whole runs on a device that is not the CPU, without one: `pretend`.

`pretend.cpp` is a device of its own for PyTorch (the key PrivateUse1): the host's memory, and the
CPU's kernels. What it has of a GPU are the rules, and the counts:

- Its tensors do not mix with the CPU's where CUDA's would not, nor with those of another device; a
  generator of another device is refused; only tensors of the CPU can be pinned; addresses are
  aligned; `_int_mm` takes CUDA's shapes only.
- It has random numbers of its own, and several devices, one for each rank.
- Bytes are counted as CUDA's allocators do: in multiples of 512 on the device, rounded up to powers
  of two in pinned memory.
- Whatever would make a GPU's host wait for it is counted with the line that asked for it: `item`,
  `tolist`, `nonzero`, masks as indices, copies to the host and from it unless they are
  asynchronous and of pinned memory.

`accelerator.py` is what DeepSpeed asks of a device. `backend.py` is a collective backend on gloo
with NCCL's rules: tensors on the rank's device, contiguous, of NCCL's dtypes; a result is there
only once its work has been waited for; what `reduce` leaves on other ranks is no number. What is
sent is counted.

What it is not: fast, asynchronous, or CUDA. There are no streams that could race, no kernels of
Triton, cuBLAS, cuSOLVER or bitsandbytes for CUDA, no fragmentation, no TF32, and products have the
CPU's rounding. docs/gpu.md says which claims rest on it, and what only a GPU can tell.

`pretend.py` builds and enables the device, `cases.py` is what the tests' ranks do with it. It is
enabled in forked ranks only: in a process of tests it would be every other test's accelerator.
"""
