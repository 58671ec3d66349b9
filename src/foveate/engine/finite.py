"""Whether all numbers of a scale are finite: written on the device, read where that costs nothing or at the end.

Axes: B images, k tokens, V outputs.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import BrokenNumbersError
from foveate.core.signals import BranchLogits
from foveate.engine.state import RequestState

_PARTS = (
    "the transformer gave logits that are not finite (NaN or infinite); its weights or the text features are damaged, "
    "or too large for {dtype}: try dtype float32",
    "guidance and temperature took logits out of the range of float32; lower guidance_scale, or raise temperature",
    "the codes of the tokenizer are not finite (NaN or infinite); its weights are damaged",
)


def finite_of(logits: Sequence[BranchLogits], guided: Sequence[Tensor], f_hat_BZHW: Tensor) -> Bool[Tensor, "parts B"]:
    """Per part (raw logits, guided ones, latent) and image, whether every number is finite.

    Sums show it: whatever is not finite stays so in a sum, and logits near the limit of float32 are broken anyway.
    """
    raw_B = torch.stack(
        [
            _total(both.cond_kV) if both.uncond_kV is None else _total(both.cond_kV) + _total(both.uncond_kV)
            for both in logits
        ]
    )
    guided_B = torch.stack([_total(part) for part in guided])
    return torch.stack((raw_B, guided_B, f_hat_BZHW.flatten(1).sum(1))).isfinite()


def _total(part: Tensor) -> Tensor:
    return part.sum(dtype=torch.float32)


def broken_numbers(state: RequestState, finite: Tensor | None) -> BrokenNumbersError | None:
    """The error of a request whose scale left broken numbers, None if it left none or it is too early to read.

    `finite` are the flags of the scale, None where it did not run.

    On a CPU every scale is read; elsewhere the last one reads all of them at once, so that the host never waits.
    """
    is_last = state.scale == len(state.request.schedule) - 1
    unread = state.finite if finite is None else [*state.finite, finite]
    if not unread or (unread[0].device.type != "cpu" and not is_last):
        return None
    flags_SPB = torch.stack(unread).cpu()
    if bool(flags_SPB.all()):
        return None
    ran = [trace.work.scale for trace in state.trace.scales if trace.ran]
    scales = [*ran, state.scale][-len(flags_SPB) :] if finite is not None else ran[-len(flags_SPB) :]
    scale, part, _ = torch.nonzero(~flags_SPB)[0].tolist()
    images = tuple(torch.nonzero(~flags_SPB.all(1).all(0)).flatten().tolist())
    dtype = str(state.cache.dtype).removeprefix("torch.")
    return BrokenNumbersError(f"scale {scales[scale]}: {_PARTS[part].format(dtype=dtype)}", images)


def check_pixels(pixels_B3YX: Float[Tensor, "B 3 Y X"]) -> None:
    """Refuses images with pixels that are NaN or infinite.

    Raises:
        BrokenNumbersError: Pixels are NaN or infinite.
    """
    broken = (~pixels_B3YX.sum((1, 2, 3), dtype=torch.float32).isfinite()).nonzero().flatten().tolist()
    if broken:
        raise BrokenNumbersError(
            "the decoder gave pixels that are not finite (NaN or infinite); its weights are damaged, or too large for "
            "its dtype: try decoder_dtype float32",
            broken,
        )
