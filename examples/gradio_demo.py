"""An image as it forms, and beside it what ran: `pip install gradio`, `python examples/gradio_demo.py [MODEL]`."""

import sys
from collections.abc import Iterator

import gradio
from PIL import Image

import foveate
from foveate.policies.registry import PRESETS, all_policies
from foveate.viz.maps import compute_map

pipe = foveate.Pipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "emoji")
SIZES = [f"{width}x{height}" for width, height in pipe.model.spec.sizes()]
PROMPT = "0" if pipe.model.spec.conditioning.names_classes else "a red apple"
OWN_SIZE = "{width}x{height}".format(**pipe.job(PROMPT, {}).kept)


def generate(prompt: str, policy: str, seed: float, size: str) -> Iterator[tuple[Image.Image, Image.Image | None, str]]:
    """Coarse images and the finished one, with the compute map at the end."""
    width, height = map(int, size.split("x"))
    try:
        events = pipe.stream(prompt, 99, policy=policy, seed=int(seed), width=width, height=height, trace=True)
        for event in events:
            assert event.image is not None, "every scale was asked for with its image"
            sheet = None if event.output is None else compute_map(event.image, event.output.trace)
            yield event.image, sheet, f"scale {event.scale + 1}: {event.tokens_run} of {event.tokens_full} tokens"
    except foveate.FoveateError as error:
        raise gradio.Error(str(error)) from error


demo = gradio.Interface(
    generate,
    [
        gradio.Textbox(PROMPT, label="prompt"),
        gradio.Dropdown([*all_policies(), *PRESETS], value="full", allow_custom_value=True, label="policy"),
        gradio.Number(7, precision=0, label="seed"),
        gradio.Dropdown(SIZES, value=OWN_SIZE, label="size"),
    ],
    [gradio.Image(label="image"), gradio.Image(label="compute map"), gradio.Textbox(label="progress")],
    flagging_mode="never",
    analytics_enabled=False,
)

if __name__ == "__main__":
    demo.launch()
