"""Quantized linear layers that ZeRO-3 can shard, in 4 and in 8 bits, by bitsandbytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_ds.planner.placement import BLOCKSIZE, NESTED_BLOCKSIZE, bytes_4bit, bytes_8bit

Kind = Literal["4bit", "8bit"]

# Rows of a weight are quantized so many at a time that no block is cut.
ROW_MULTIPLE = 64
# Elements that are read or quantized at a time. On a CPU bitsandbytes takes 14 bytes for each, and
# is fastest at this size.
CHUNK = 1 << 20


def rows_at_a_time(width: int, multiple: int) -> int:
    """Return how many rows make about ``CHUNK`` elements, a multiple of some number."""
    return max(1, CHUNK // max(1, width) // multiple) * multiple


class PackedLinear(nn.Linear, ABC):
    """``y = W x + b``, W (out, in) quantized.

    Codes and scales are stored in one frozen parameter, since ZeRO-3 shards only parameters.
    bitsandbytes' own layers keep their scales outside, whole on every rank; their backward keeps
    the bytes that ZeRO-3 gathered for the forward; and on CPUs with AVX512-BF16 they repack them in
    place. Only weights are quantized here: x and the products have ``dtype``.

    Attributes:
        stored_transposed: whether a checkpoint stores W as (in, out).
        weight: bytes viewed as a flat bf16 vector, which DeepSpeed neither casts nor skips; they
            are not numbers. On the meta device until it is filled.
        dtype: of the dequantized W, and so of x, b and y.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        num_bytes: Sequence[int],
    ) -> None:
        """
        Args:
            num_bytes: sizes of the parts of ``weight``.
        """
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.bias: Any = bias
        self.dtype = dtype
        self.stored_transposed = False
        self._num_bytes = list(num_bytes)
        packed = torch.empty(-(-sum(num_bytes) // 2), dtype=torch.bfloat16, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)

    @abstractmethod
    def quantize(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the value of ``weight`` for a W that is quantized a few rows at a time.

        Args:
            rows: the rows of W in order, (rows, in) each; all but the last have a multiple of
                ``ROW_MULTIPLE`` rows.
        Raises:
            ValueError: if a scale is not finite.
        """

    def quantize_whole(self, W: torch.Tensor) -> torch.Tensor:
        """Return the value of ``weight`` for a whole W (out, in); see ``quantize``."""
        return self.quantize(W.split(rows_at_a_time(self.in_features, ROW_MULTIPLE)))

    @abstractmethod
    def pack_stored(self, codes: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of ``weight`` for a W that bitsandbytes has quantized.

        Args:
            codes: as a checkpoint stores them.
            beside: the tensors stored beside the codes, by bitsandbytes' names.
        Raises:
            ValueError: if it is quantized in another way than this layer.
        """

    @abstractmethod
    def dequantize(self, packed: torch.Tensor | None = None) -> torch.Tensor:
        """Return a new W (out, in) in ``dtype``. Under ZeRO-3 the weight must be gathered.

        Args:
            packed: a value of ``weight``. [default: the layer's own]
        """

    def pack(self, *parts: torch.Tensor) -> torch.Tensor:
        """Join parts of any dtype to one flat bf16 vector of their bytes, of an even length."""
        views = [_bytes_of(part) for part in parts]
        if [len(view) for view in views] != self._num_bytes:
            raise ValueError(f"parts of {[len(v) for v in views]} bytes, not {self._num_bytes}")
        packed = self._zeros(views[0].device)
        for part, view in zip(self.parts(packed), views, strict=True):
            part.copy_(view)
        return packed

    def parts(self, packed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Return uint8 views of the parts of ``weight`` (or of a value for it)."""
        packed = (self.weight.detach() if packed is None else packed).view(torch.uint8)
        return packed[: sum(self._num_bytes)].split(self._num_bytes)

    def _zeros(self, device: torch.device) -> torch.Tensor:
        """Return a value for ``weight``, to be filled in place.

        Small pieces that are kept, allocated between others that are freed, would fragment a host's
        memory by several times their size.
        """
        return torch.zeros(self.weight.shape, dtype=torch.bfloat16, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _PackedLinearFunction.apply(x, self)


class _PackedLinearFunction(torch.autograd.Function):
    """``F.linear`` that saves no weight for its backward, neither packed nor dequantized.

    The backward reads the layer's parameter at that time: ZeRO-3 has gathered it again.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.layer.dequantize(), None


class PackedLinear4bit(PackedLinear):
    """W in NF4 or FP4 (QLoRA, arXiv 2305.14314), (de)quantized by bitsandbytes to the same bits.

    Parts of ``weight``: the codes, row by row, two in a byte; then, with double quantization
    (``nested``), the scale of every block in uint8, the scale of every 256 of those in fp32, and
    their mean in fp32; otherwise the scale of every block in fp32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        *,
        quant_type: str = "nf4",
        blocksize: int = BLOCKSIZE,
        nested: bool = True,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            stored_dtype: dtype that bitsandbytes dequantizes to, before the cast to ``dtype``.
                [default: ``dtype``]
        """
        num_bytes = bytes_4bit(out_features, in_features, blocksize, nested)
        super().__init__(in_features, out_features, bias, dtype, num_bytes)
        self.quant_type, self.blocksize, self.nested = quant_type, blocksize, nested
        self.stored_dtype = stored_dtype or dtype

    def quantize(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        chunk, rows = _first(rows)
        packed = self._zeros(chunk.device)
        codes, *scales = self.parts(packed)
        numel = self.in_features * self.out_features
        absmax = torch.empty(-(-numel // self.blocksize), device=chunk.device)
        code, block = 0, 0
        for chunk in rows:
            found, state = quantize_4bit(
                chunk.contiguous(), blocksize=self.blocksize, quant_type=self.quant_type
            )
            codes[code : code + found.numel()] = found.flatten()
            absmax[block : block + len(state.absmax)] = state.absmax
            code, block = code + found.numel(), block + len(state.absmax)
        found_scales = [absmax]
        if self.nested:
            # As quantize_4bit does for a whole weight with compress_statistics.
            offset = absmax.mean()
            nested_absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
            found_scales = [nested_absmax, nested.absmax, offset]
        for part, scale in zip(scales, found_scales, strict=True):
            part.copy_(_bytes_of(scale))
        return packed

    def pack_stored(self, codes: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

        state = QuantState.from_dict(dict(beside), device=codes.device)
        standard = torch.equal(state.code, get_4bit_type(self.quant_type, device=codes.device))
        if self.nested:
            dynamic_map = create_dynamic_map().to(codes.device)
            standard &= torch.allclose(state.state2.code, dynamic_map, atol=1e-6, rtol=0)
        if not standard:
            raise ValueError("it was quantized with another map than bitsandbytes' own")
        if not self.nested:
            return self.pack(codes, state.absmax)
        return self.pack(codes, state.absmax, state.state2.absmax, state.offset)

    def dequantize(self, packed: torch.Tensor | None = None) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        codes, absmax, *fp32 = self.parts(packed)
        if self.nested:
            # Copied, since an fp32 view must be aligned; it is a 16384th of the numbers.
            absmax2, offset = (part.clone().view(torch.float32) for part in fp32)
            scales = dequantize_blockwise(absmax, absmax=absmax2, blocksize=NESTED_BLOCKSIZE)
            scales = scales.add_(offset)
        else:
            scales = absmax.clone().view(torch.float32)
        state = QuantState(
            scales,
            torch.Size((self.out_features, self.in_features)),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.stored_dtype,
        )
        return dequantize_4bit(codes, state).to(self.dtype)


class PackedLinear8bit(PackedLinear):
    """W in int8 with a scale for each row, quantized by bitsandbytes (LLM.int8, arXiv 2208.07339).

    Unlike in LLM.int8 the input is not quantized. Parts of ``weight``: int8 codes; the largest
    absolute value of each row, fp32, which the code 127 stands for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        num_bytes = bytes_8bit(out_features, in_features)
        super().__init__(in_features, out_features, bias, dtype, num_bytes)

    def quantize(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        chunk, rows = _first(rows)
        packed = self._zeros(chunk.device)
        codes, scales = self.parts(packed)
        row = 0
        for chunk in rows:
            found, scale, _ = int8_vectorwise_quant(chunk.half().contiguous())
            if not torch.isfinite(scale).all():
                raise ValueError("a weight exceeds fp16's range, which 8 bits are made from")
            end = row + len(chunk)
            codes[row * self.in_features : end * self.in_features] = _bytes_of(found)
            scales[4 * row : 4 * end] = _bytes_of(scale)
            row = end
        return packed

    def pack_stored(self, codes: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if beside.get("weight_format", torch.zeros(1)).any():
            raise ValueError("its codes are not stored row by row (weight_format is not 0)")
        return self.pack(codes, beside["SCB"].float())

    def dequantize(self, packed: torch.Tensor | None = None) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        codes, scales = self.parts(packed)
        codes = codes.view(torch.int8).view(self.out_features, self.in_features)
        scales = scales.clone().view(torch.float32)  # copied, since an fp32 view must be aligned
        W = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        # A few rows at a time: bitsandbytes makes them in fp32, twice.
        step = max(1, (1 << 22) // self.in_features)
        for rows, part, scale in zip(
            W.split(step), codes.split(step), scales.split(step), strict=True
        ):
            rows.copy_(int8_vectorwise_dequant(part, scale))
        return W


def stored_4bit(W: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a W (out, in) to NF4 with double quantization, as transformers stores it.

    Returns:
        The codes under the name "", and the tensors beside them under bitsandbytes' names.
    """
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    layer = PackedLinear4bit(W.shape[1], W.shape[0], None, W.dtype)
    codes, absmax, *fp32 = layer.parts(layer.quantize_whole(W))
    absmax2, offset = (part.clone().view(torch.float32) for part in fp32)
    nested_map = create_dynamic_map().to(W.device)
    nested = QuantState(absmax2, code=nested_map, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    code, kind = get_4bit_type(layer.quant_type, device=W.device), layer.quant_type
    state = QuantState(absmax, W.shape, code, layer.blocksize, kind, W.dtype, offset, nested)
    return {"": codes.view(-1, 1), **state.as_dict(packed=True)}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _first(rows: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
    """Return the first item, and an iterator over all of them."""
    iterator = iter(rows)
    first = next(iterator)
    return first, chain([first], iterator)
