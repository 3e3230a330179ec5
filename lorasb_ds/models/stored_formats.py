"""Weights stored in FP8 or MXFP4: which tensors of a checkpoint make them, and what they decode to.

``decoded`` turns the tensors of such a checkpoint into those of one in full precision, which
``streaming`` reads: it decodes a few rows at a time. Facts are from transformers'
``integrations/finegrained_fp8.py`` and ``integrations/mxfp4.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor

# quant_method in config.json -> what messages call it.
STORED_FORMATS = {"fp8": "FP8", "mxfp4": "MXFP4"}
BLOCK_SIZE = (128, 128)  # of FP8 where config.json names none
GROUP = 32  # FP4 codes of a row that share a scale

# What codes stand for: OCP's Microscaling Formats, version 1.0 (FP4 is E2M1).
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*MAGNITUDES, *(-value for value in MAGNITUDES))
FP4_PAIRS = torch.tensor([(low, high) for high, low in product(FP4, repeat=2)])  # of each byte
E8M0 = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), torch.nan])
SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALES |= {"F8_E8M0": torch.uint8, "U8": torch.uint8}  # both E8M0

# Reads bytes of a tensor: its name, the tensor, the first byte, their number.
Read = Callable[[str, StoredTensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """A matrix (out, in), or a stack of them, stored as codes with a scale for each block.

    Attributes:
        name, codes: the tensor of the codes: E4M3, or pairs of FP4 in bytes.
        scales_name, scales: the tensor of the scales.
        sides: out and in.
        block: rows and columns that share a scale; blocks at the edges may be smaller.
        transposed: whether the model's matrices are (in, out).
    """

    name: str
    codes: StoredTensor
    scales_name: str
    scales: StoredTensor
    sides: tuple[int, int]
    block: tuple[int, int]
    transposed: bool = False

    def chunks(
        self, read: Read, first: int, last: int, step: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[torch.Tensor]:
        """Yield rows ``first`` to ``last`` of the model's matrices, one below the other.

        Args:
            first, last: bounds of matrices, if they are transposed.
            step: rows at a time; if they are transposed, a whole matrix comes at a time.
        Raises:
            ValueError: naming tensor and file, if a scale is not finite.
        """
        if not self.transposed:
            for start in range(first, last, step):
                yield self._rows(read, start, min(start + step, last), device).to(dtype)
            return
        height, width = self.sides
        for matrix in range(first // width, last // width):
            W = torch.empty(width, height, dtype=dtype, device=device)
            for start in range(0, height, step):
                stop = min(start + step, height)
                rows = self._rows(read, matrix * height + start, matrix * height + stop, device)
                W[:, start:stop] = rows.T
            yield W

    def _rows(self, read: Read, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Return rows of the stored matrices, one below the other, in fp32."""
        (height, width), (rows, columns) = self.sides, self.block
        codes = read(self.name, self.codes, *_range(first, last, width // self._codes_a_byte))
        codes = codes.to(device).view(last - first, -1)
        if self.codes.dtype == "F8_E4M3":
            W = codes.view(torch.float8_e4m3fn).float()
        else:
            W = F.embedding(codes.int(), FP4_PAIRS.to(device)).flatten(-2)
        # The row of scales that belongs to each row.
        row = torch.arange(first, last)
        row = row // height * -(-height // rows) + row % height // rows
        scales = self._scale_rows(read, int(row[0]), int(row[-1]) + 1, -(-width // columns))
        scales = scales[row - row[0]].to(device)
        return W.mul_(scales.repeat_interleave(columns, 1)[:, :width])

    @property
    def _codes_a_byte(self) -> int:
        return 1 if self.codes.dtype == "F8_E4M3" else 2

    def _scale_rows(self, read: Read, first: int, last: int, width: int) -> torch.Tensor:
        dtype = SCALES[self.scales.dtype]
        scales = read(self.scales_name, self.scales, *_range(first, last, width * dtype.itemsize))
        scales = scales.view(dtype).view(last - first, width)
        scales = E8M0[scales.int()] if dtype == torch.uint8 else scales.float()
        if not torch.isfinite(scales).all():
            raise ValueError(
                f"{self.scales_name} in {self.scales.file.name} holds scales that are not finite"
            )
        return scales


@dataclass(frozen=True)
class EncodedTensor(StoredTensor):
    """A weight that is decoded as it is read, in fp32.

    ``shape`` is the weight's; ``dtype`` is BF16, that of such a model in full precision; ``file``,
    ``begin`` and ``end`` are those of the codes.
    """

    decoder: Decoder


def decoded(
    stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, model: str
) -> dict[str, StoredTensor]:
    """Return the tensors that a checkpoint would have in full precision.

    Args:
        stored: of ``stored_tensors``.
        quantization: ``quantization_config`` of config.json, with a quant_method of
            ``STORED_FORMATS``; None: nothing is encoded.
        model: as --model gives it, for messages.
    Returns:
        Weights that are stored as codes and scales are one ``EncodedTensor`` each, under the name
        that the weight would have; the others are as they are.
    Raises:
        ConfigError: naming tensor and file, if codes and scales do not belong together.
    """
    if quantization is None:
        return dict(stored)
    try:
        if quantization["quant_method"] == "mxfp4":
            return _decoded_mxfp4(stored)
        return _decoded_fp8(stored, _block_size(quantization))
    except ValueError as error:
        raise ConfigError(f"--model {model}: {error}. Fetch the files again.") from error


def _block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    found = quantization.get("weight_block_size", BLOCK_SIZE)
    if found is None:
        return None
    if (
        not isinstance(found, list | tuple)
        or len(found) != 2
        or not all(type(n) is int and n > 0 for n in found)
    ):
        raise ValueError(
            f"weight_block_size in config.json is {found!r}; two whole numbers or null are allowed"
        )
    return found[0], found[1]


def _decoded_fp8(
    stored: Mapping[str, StoredTensor], block_size: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    """Pair weights in FP8 with their scales; and in FP4, as DeepSeek-V4's experts are (I8).

    Raises:
        ValueError: if they do not belong together.
    """
    result = dict(stored)
    for name, codes in stored.items():
        scales_name = _fp8_scales_name(name, stored)
        fp4 = codes.dtype == "I8" and scales_name in stored
        if codes.dtype != "F8_E4M3" and not fp4:
            continue
        scales = _scales_of(name, codes, scales_name, stored, SCALES)
        shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if fp4 else codes.shape
        size = (1, GROUP) if fp4 else block_size
        block = _block_of(shape, scales.shape, size)
        if block is None:
            blocks = f", or for each block of {size}" if size else ""
            raise ValueError(
                f"{scales_name} in {scales.file.name} has shape {scales.shape}, but {name} of "
                f"shape {shape} needs one for each matrix, for each row{blocks}"
            )
        decoder = Decoder(name, codes, scales_name, scales, (shape[-2], shape[-1]), block)
        result[name] = _encoded(shape, decoder)
        del result[scales_name]
        # The scale of the layer's inputs, which are not quantized here.
        result.pop(f"{name.removesuffix('.weight')}.activation_scale", None)
    if odd := [name for name in result if name.endswith("_scale_inv")]:
        weight = odd[0].removesuffix("_scale_inv")
        found = f"stored as {result[weight].dtype}" if weight in result else "missing"
        raise ValueError(
            f"{odd[0]} in {stored[odd[0]].file.name} is the scale of {weight}, which is {found}; "
            "it must be F8_E4M3"
        )
    return result


def _fp8_scales_name(name: str, stored: Mapping[str, StoredTensor]) -> str:
    """Return the name of a weight's scales, there or not."""
    layer = name.removesuffix(".weight")
    usual = f"{name}_scale_inv"
    others = (f"{layer}.scale", f"{layer}.qscale_weight")  # DeepSeek-V4's, Mistral's
    return next((found for found in others if usual not in stored and found in stored), usual)


def _block_of(
    weight: tuple[int, ...], scales: tuple[int, ...], block_size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if the shapes do not fit."""
    if len(weight) < 2:
        return None
    *stack, rows, columns = weight
    blocks = {(*stack, rows, 1): (1, columns), (*stack, 1, 1): (rows, columns)}
    if not stack:
        blocks |= {(): (rows, columns), (1,): (rows, columns)}
    if block_size is not None:
        grid = (*stack, -(-rows // block_size[0]), -(-columns // block_size[1]))
        blocks[grid] = block_size
    return blocks.get(scales)


def _decoded_mxfp4(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Pair ``<weight>_blocks`` (experts, out, in / 32, 16) with ``<weight>_scales``.

    Raises:
        ValueError: if they do not belong together.
    """
    result = dict(stored)
    for codes_name, codes in stored.items():
        if not codes_name.endswith("_blocks"):
            continue
        name = codes_name.removesuffix("_blocks")
        scales_name = f"{name}_scales"
        scales = _scales_of(codes_name, codes, scales_name, stored, ("U8",))
        if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != GROUP // 2:
            raise ValueError(
                f"{codes_name} in {codes.file.name} is {codes.dtype} of shape {codes.shape}; MXFP4 "
                f"experts are U8 of shape (experts, out, in / {GROUP}, {GROUP // 2})"
            )
        if scales.shape != codes.shape[:-1]:
            raise ValueError(
                f"{scales_name} in {scales.file.name} has shape {scales.shape}, but {codes_name} "
                f"of shape {codes.shape} needs {codes.shape[:-1]}"
            )
        experts, rows, groups, _ = codes.shape
        sides = (rows, groups * GROUP)
        decoder = Decoder(codes_name, codes, scales_name, scales, sides, (1, GROUP), True)
        del result[codes_name], result[scales_name]
        result[name] = _encoded((experts, *reversed(sides)), decoder)
    return result


def _scales_of(
    name: str,
    codes: StoredTensor,
    scales_name: str,
    stored: Mapping[str, StoredTensor],
    dtypes: Collection[str],
) -> StoredTensor:
    if scales_name not in stored:
        raise ValueError(
            f"{name} in {codes.file.name} is quantized, but its scales, {scales_name}, are missing"
        )
    scales = stored[scales_name]
    if scales.dtype not in dtypes:
        raise ValueError(
            f"{scales_name} in {scales.file.name} is stored as {scales.dtype}; scales are "
            f"{', '.join(dtypes)}"
        )
    return scales


def _encoded(shape: tuple[int, ...], decoder: Decoder) -> EncodedTensor:
    codes = decoder.codes
    return EncodedTensor(codes.file, "BF16", shape, codes.begin, codes.end, decoder)


def _range(first: int, last: int, row_bytes: int) -> tuple[int, int]:
    """Return the first byte of some rows, and the number of bytes."""
    return first * row_bytes, (last - first) * row_bytes
