"""Gradients of compiled and of plain blocks on random inputs; prints "equal" or raises."""

import sys

import torch

from foveate.core.layers import init_weights
from foveate.core.schedule import ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.bsq import quantise
from recipes.emoji.teacher import Teacher, pad_texts
from recipes.emoji.transformer import bit_loss, small_start

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))


def main() -> None:
    """Compares."""
    config = InfinityConfig(depth=3, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)
    texts = pad_texts([torch.randn(5, 12), torch.randn(3, 12)], 8)
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    model = Infinity(config)
    init_weights(model)
    small_start(model)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    plain = Teacher(model=model, schedule=ScaleSchedule.from_grids(GRIDS), masked_tokens=6, dtype=torch.float32)
    found = []
    for teacher in (plain, plain.compiled()):
        model.zero_grad()
        loss, _ = bit_loss(teacher.logits(texts, quantised.inputs), quantised, 0.5)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 50
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main()
