"""A linear layer whose weights and inputs are multiplied in eight bits of floating point (e4m3), scaled per row.

Tensor cores from compute capability 8.9 on do this at twice the rate of bfloat16. A CPU computes the same numbers,
without the speed.
Axes: n tokens, i inputs, o outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fp8Weight:
    """A weight in place of a tensor of it; `kernels.linear` knows both.

    Attributes:
        codes_oi: e4m3.
        scale_1o: Float32; what the codes of an output are to be multiplied by.
        dtype: What the layer reads and returns: bfloat16, which is all that row-wise products of a GPU can return.
    """

    codes_oi: Shaped[Tensor, "o i"]
    scale_1o: Float[Tensor, "1 o"]
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, weight_oi: Float[Tensor, "o i"]) -> "Fp8Weight":
        """Rounds a weight; its largest number in every row becomes the largest code."""
        codes_oi, scale_o1 = _scaled(weight_oi)
        return cls(codes_oi=codes_oi, scale_1o=scale_o1.t().contiguous())

    def product(self, x: Float[Tensor, "*n i"], bias: Float[Tensor, " o"] | None) -> Float[Tensor, "*n o"]:
        """`x` times the transposed weight, plus the bias; every row of `x` is scaled by its own largest number."""
        x_ni = x.reshape(-1, x.shape[-1])
        if not len(x_ni):
            return x.new_empty(*x.shape[:-1], len(self.codes_oi))
        codes_ni, scale_n1 = _scaled(x_ni)
        out_no: Tensor = torch._scaled_mm(
            codes_ni,
            self.codes_oi.t(),
            scale_a=scale_n1,
            scale_b=self.scale_1o,
            bias=None if bias is None else bias.to(self.dtype),
            out_dtype=self.dtype,
            use_fast_accum=x.is_cuda,
        )
        return out_no.view(*x.shape[:-1], -1)


def _scaled(rows: Float[Tensor, "n i"]) -> tuple[Shaped[Tensor, "n i"], Float[Tensor, "n 1"]]:
    scale_n1 = rows.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (rows.float() / scale_n1).clamp(-_LARGEST, _LARGEST).to(E4M3), scale_n1
