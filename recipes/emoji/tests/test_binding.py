"""The measure of binding: captions that are false in one word, and a loss that no batch changes."""

import numpy as np
import pytest
import torch

from foveate.core.layers import init_weights
from foveate.core.schedule import ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.bsq import quantise
from recipes.emoji.binding import EXCHANGED, exchanged, in_order, loss_per_scale, turned
from recipes.emoji.scenes import Placed, Scene, render
from recipes.emoji.teacher import Teacher, pad_texts
from recipes.emoji.transformer import bit_loss

GRIDS = ((1, 1), (2, 2), (3, 3))
SHAPE = InfinityConfig(depth=2, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)


@pytest.mark.parametrize(
    ("kind", "true", "false"),
    [
        ("beside", "a cat to the left of a bus", "a cat to the right of a bus"),
        ("beside", "a cat to the right of a bus on a red background", "a cat to the left of a bus on a red background"),
        ("stacked", "a cat above a bus", "a cat below a bus"),
        ("stacked", "a cat below a bus", "a cat above a bus"),
    ],
)
def test_only_the_word_for_the_side_changes(kind: str, true: str, false: str) -> None:
    assert exchanged(true, EXCHANGED[kind]) == false


def test_the_loss_is_the_mean_over_scenes_whatever_the_batches_and_the_padding() -> None:
    """Forty scenes in two unequal batches, against one scene at a time without padding."""
    torch.manual_seed(5)
    model = Infinity(SHAPE)
    init_weights(model)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    teacher = Teacher(model=model, schedule=ScaleSchedule.from_grids(GRIDS), masked_tokens=5, dtype=torch.float32)
    latents_BZHW = torch.randn(40, 8, 3, 3)
    texts = [torch.randn(2 + index % 5, 12) for index in range(40)]
    single = []
    with torch.no_grad():
        found = loss_per_scale(teacher, texts, latents_BZHW, GRIDS)
        for text_TE, latent_ZHW in zip(texts, latents_BZHW, strict=True):
            quantised = quantise(latent_ZHW[None], GRIDS)
            logits = teacher.logits(pad_texts([text_TE], len(text_TE)), quantised.inputs)
            single.append(bit_loss(logits, quantised, 0.5)[1].numpy())
        other = loss_per_scale(teacher, texts[::-1], latents_BZHW, GRIDS)
    np.testing.assert_allclose(found, np.mean(single, axis=0), rtol=1e-4)
    assert np.abs(found - other).max() > 1e-4


def test_pictures_are_in_order_where_they_show_the_scene_and_not_the_turned_one() -> None:
    images_NYXc = torch.randint(0, 256, (4, 32, 32, 4), dtype=torch.uint8)
    images_NYXc[..., 3] = 255
    scenes = [
        Scene(
            background="white",
            things=(
                Placed(drawing=index, centre=(0.5, 0.25), size=0.4),
                Placed(drawing=index + 1, centre=(0.5, 0.75), size=0.4),
            ),
            caption="two things",
            kind="beside",
            style="fluent-3d",
        )
        for index in range(3)
    ]
    drawn = (render([scenes[0], turned(scenes[1]), scenes[2]], images_NYXc, (32, 32)) + 1) / 2
    blurred = torch.nn.functional.avg_pool2d(drawn, 3, stride=1, padding=1, count_include_pad=False)
    assert in_order(blurred, scenes, images_NYXc) == 2
    assert in_order(blurred, [turned(scene) for scene in scenes], images_NYXc) == 1
    assert turned(turned(scenes[0])) == scenes[0]
