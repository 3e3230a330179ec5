"""The basis of a run while it is made: factors go to its file as they are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.run_layout import BASIS_FILE, INIT_REPORT
from lorasb_ds.init.factors import Basis
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.tensor_reader import DTYPE_NAMES
from lorasb_ds.system.files import write_json, write_sums, written_aside
from lorasb_ds.system.safetensors_writer import ALIGNMENT, TensorWriter, bytes_of

EXPERT_TENSORS = ("captured_energy", "spectrum", "slopes", "tokens")  # of ExpertsInit
ENTRY_BYTES = 200  # at most, of a tensor's entry in the header, beside its name


class BasisWriter:
    """Writes init.json and basis.safetensors; their SHA256SUMS, written last, marks the init done.

    basis.safetensors holds the initial factors, frozen ones in the run's dtype and trained ones in
    fp32: ``<layer>.lora_A`` (r, in), ``.lora_B`` (out, r), and ``.lora_R`` (r, r) or ``.offset_A``
    and ``.offset_B``. If a matrix was decomposed, also ``.S`` and ``.slopes``, the singular values
    and ``LayerInit.slopes``. For PEFT's methods it holds the tensors that PEFT has added, by PEFT's
    names.

    A context manager: the file takes its name when the init is finished; nothing is left of one
    that was not.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], made_from: Mapping[str, Any]
    ) -> None:
        """
        Args:
            sizes: names of tensors -> upper bounds of their bytes.
            made_from: from ``basis.fingerprint``.
        Raises:
            OSError: if there is no room for it.
        """
        self.folder = folder
        made = json.dumps(dict(made_from), sort_keys=True)
        self._metadata = {"format": "pt", "made_from": made}
        self._late: Basis = {}  # R, of which eta is found at the end; and what would not align
        header = 2 * len(made) + sum(len(name) + ENTRY_BYTES for name in sizes) + ENTRY_BYTES
        with ExitStack() as stack:
            aside = stack.enter_context(written_aside(folder / BASIS_FILE))
            writer = TensorWriter(aside, header, sum(sizes.values()))
            self._writer = stack.enter_context(closing(writer))
            self._names: list[str] = []
            self._open = stack.pop_all()

    def __enter__(self) -> BasisWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def add(self, factors: Basis) -> None:
        """Write some factors, on the CPU."""
        for name, tensor in factors.items():
            if name.endswith(".lora_R") or tensor.nbytes % ALIGNMENT:
                self._late[name] = tensor
            else:
                self._write(name, tensor)

    def finish(self, report: InitReport) -> None:
        """Write the rest, and the report."""
        content, late = asdict(report), self._late
        if report.step.init_lr is not None:
            for name, found in report.decompositions.items():
                late[f"{name}.lora_R"] = found.R(report.step.init_lr)
        for name, experts in content["experts"].items():
            late |= {f"{name}.{key}": experts.pop(key) for key in EXPERT_TENSORS}
        for name, layer in content["layers"].items():
            late[f"{name}.S"] = torch.tensor(layer.pop("spectrum"))
            late[f"{name}.slopes"] = torch.tensor(layer.pop("slopes"))
        for name, tensor in sorted(late.items(), key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        self._writer.finish(sorted(self._names), self._metadata)
        self._open.close()
        write_json(self.folder / INIT_REPORT, content)
        write_sums(self.folder, (BASIS_FILE, INIT_REPORT))

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.cpu().contiguous()
        self._writer.add(name, DTYPE_NAMES[tensor.dtype], tensor.shape, [bytes_of(tensor)])
        self._names.append(name)


def basis_sizes(adapters: Mapping[str, AdapterLinear]) -> dict[str, int]:
    """Return upper bounds of the bytes of a basis's tensors, by name. Not collective."""
    sizes = {}
    for name, adapter in adapters.items():
        for key in adapter.frozen + adapter.trained:
            numel = adapter.factor_shape(key).numel()
            in_file = torch.float32 if key in adapter.trained else adapter.factor(key).dtype
            sizes[f"{name}.{key}"] = numel * in_file.itemsize
        # A method may take several times r singular values.
        of_all = 8 * adapter.num_matrices * 4 * max(adapter.r, 1)
        sizes |= {f"{name}.{key}": of_all for key in ("S", *EXPERT_TENSORS)}
    return sizes
