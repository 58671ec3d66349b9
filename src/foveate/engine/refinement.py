"""A family's step between sampling and commit of the last scale: what it is given, what it adds, and for how long.

Axes: B images, k tokens that reach the head, C width, Z latent channels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.protocols import RefineInput, Refiner
from foveate.engine.branches import per_image
from foveate.engine.clock import Clock
from foveate.engine.scale_run import ScaleRun


def refine_inputs(run: ScaleRun, hidden_kC: Float[Tensor, "k C"], drawn: Sequence[Tensor]) -> tuple[RefineInput, ...]:
    """What the refiner reads of each image; where the last scale is not guided there is no unconditional branch.

    Args:
        run: The last scale, behind its blocks.
        hidden_kC: Hidden states of all rows that reach the head.
        drawn: The symbols of each image's tokens, drawn before codes are mixed.
    """
    sampler = run.state.request.sampler
    return tuple(
        RefineInput(
            scale=run.scale.index,
            grid=run.scale.grid,
            seed=sampler.seed_of(image),
            generator=sampler.generator_of(),
            cond_kC=hidden.cond_kV,
            uncond_uC=hidden.uncond_kV,
            uncond_index_u=hidden.uncond_index_u,
            symbols_kd=symbols_kd,
            index_k=hidden.index_k,
            weight=run.weight,
        )
        for image, (hidden, symbols_kd) in enumerate(zip(per_image(run, hidden_kC), drawn, strict=True))
    )


def refine(
    refiner: Refiner, clock: Clock, inputs: Sequence[RefineInput], like_BZhw: Float[Tensor, "B Z h w"]
) -> Float[Tensor, "B Z h w"]:
    """What the refiner adds to the latents of the tokens that ran, zeros elsewhere.

    Args:
        refiner: The family's.
        clock: Times it.
        inputs: One per image.
        like_BZhw: Of the shape, dtype and device of the result.
    """
    clock.start()
    added_BZl = torch.zeros_like(like_BZhw).flatten(2)
    for image, given in enumerate(inputs):
        latents_kZ = refiner.refine(given)
        added_BZl[image, :, slice(None) if given.index_k is None else given.index_k] = latents_kZ.T
    clock.stop()
    return added_BZl.view_as(like_BZhw)


def refined_tokens(inputs: Sequence[RefineInput]) -> dict[Row, int]:
    """Tokens that the refiner read, by row."""
    counts: dict[Row, int] = {}
    for image, given in enumerate(inputs):
        counts[(image, True)] = len(given.cond_kC)
        if given.uncond_uC is not None:
            counts[(image, False)] = len(given.uncond_uC)
    return counts
