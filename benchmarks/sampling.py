"""Which guidance and temperature suit the bundled model: nearest-drawing score over a small grid.

    python benchmarks/sampling.py --corpus RUN/corpus --model RUN/emoji-tiny

Sixty prompts, one seed; a picture counts if its nearest drawing of the whole corpus is the one that was asked for.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from foveate.eval.features import features, load_network
from foveate.eval.quality import nearest
from foveate.pipeline import Pipeline, stack_uint8
from foveate.pipeline_output import to_uint8
from foveate.train.corpus import load_corpus
from foveate.train.tokenizer import composite

GUIDANCE = (1.5, 2.5, 4.0)
TEMPERATURE = (0.2, 0.5, 0.8)


def main() -> None:
    """Prints one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=60)
    given = parser.parse_args()
    corpus, network = load_corpus(given.corpus), load_network()
    drawings = list(corpus.drawings)
    real = features(to_uint8(composite(np.array(corpus.images_NYXc))), network=network)
    train = [d.label for d in drawings if d.split == "train"]
    wanted = [train[int(i * len(train) / given.prompts)] for i in range(given.prompts)]
    pipe = Pipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    for guidance in GUIDANCE:
        for temperature in TEMPERATURE:
            options: dict[str, Any] = {"seed": 0, "guidance_scale": guidance, "temperature": temperature}
            parts = [pipe.generate(wanted[i : i + 10], **options).images for i in range(0, len(wanted), 10)]
            found = nearest(features(np.concatenate([stack_uint8(p) for p in parts]), network=network), real)
            hits = np.mean([drawings[i].label == label for i, label in zip(found, wanted, strict=True)])
            print(f"guidance {guidance} temperature {temperature}: {100 * hits:.0f} %", flush=True)


if __name__ == "__main__":
    main()
