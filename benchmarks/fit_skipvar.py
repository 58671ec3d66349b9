"""Fits the two small models of SkipVAR to a network and writes them as JSON: `src/foveate/data/skipvar.json`.

    python benchmarks/fit_skipvar.py --prompts benchmarks/prompts.txt --output src/foveate/data/skipvar.json

Every prompt is generated in full, and once for every number of final scales without the unconditional branch. A label
is the largest count whose PSNR to the full run is at least `--bound` dB. Multinomial logistic regression in numpy, with
a penalty of half the squared weights as in scikit-learn's default. Four fifths of the prompts at a time predict the
other fifth, which says what the choice costs on prompts that it never saw. 64 prompts take some minutes on two cores.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.atomic import write_text
from foveate.core.policy import Policy
from foveate.core.prompt_file import read_prompt_file
from foveate.eval.fidelity import psnr
from foveate.pipeline.output import to_uint8
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.drop_branch import DropBranch
from foveate.policies.full import Full
from foveate.policies.skipvar import FEATURES, SIDE, CountModel, features

ROOT = Path(__file__).parents[1]
FOLDS, STEPS, RATE, BIAS_PENALTY = 5, 20_000, 0.3, 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Per image: features, and PSNR to the full run with 1, 2, ... fewer scales, or scales with both branches."""

    inputs: np.ndarray
    scales_db: np.ndarray
    branch_db: np.ndarray


def latents(pipe: Pipeline, prompts: Sequence[str], seed: int, policy: Policy) -> list[Tensor]:
    """The latent after every scale."""
    seen: list[Tensor] = []

    def note(_pipe: object, _scale: int, _left: int, values: dict[str, Any]) -> None:
        seen.append(values["latents"])

    pipe(list(prompts), seed=seed, policy=policy, output_type="latent", callback_on_step_end=note)
    return seen


def collect(pipe: Pipeline, prompts: Sequence[str], seed: int, num_scales: int, batch: int) -> Examples:
    """Generates everything; final scales that do not run leave the full run's latent of an earlier scale."""
    tokenizer = pipe.model.tokenizer

    def pictures(latent_BZHW: Tensor) -> np.ndarray:
        return to_uint8(tokenizer.decode(latent_BZHW))

    parts = []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        steps = latents(pipe, some, seed, Full())
        whole, first = pictures(steps[-1]), len(steps) - num_scales
        before, after = (
            tokenizer.decode(F.interpolate(step, size=(SIDE, SIDE), mode="area")) for step in steps[first - 2 : first]
        )
        counts = range(1, num_scales + 1)
        fewer = [psnr(pictures(steps[-1 - n]), whole) for n in counts]
        single = [psnr(pictures(latents(pipe, some, seed, DropBranch(count=n))[-1]), whole) for n in counts]
        parts.append((features(before, after).double().numpy(), np.stack(fewer, 1), np.stack(single, 1)))
        print(f"{min(i + batch, len(prompts))} of {len(prompts)} prompts", flush=True)
    inputs, scales_db, branch_db = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Examples(inputs=inputs, scales_db=scales_db, branch_db=branch_db)


def largest_counts(db: np.ndarray, bound: float) -> np.ndarray:
    """The largest count that stays above the bound, 0 if none does; `db` has one column per count from 1."""
    return np.max((db >= bound) * np.arange(1, db.shape[1] + 1), axis=1)


def fit(inputs: np.ndarray, labels: np.ndarray, num_classes: int) -> CountModel:
    """Multinomial logistic regression by gradient descent; `inputs` are standardised."""
    num, width = inputs.shape
    hot = np.eye(num_classes)[labels]
    weights, biases = np.zeros((num_classes, width)), np.zeros(num_classes)
    for _ in range(STEPS):
        logits = inputs @ weights.T + biases
        shares = np.exp(logits - logits.max(1, keepdims=True))
        error = shares / shares.sum(1, keepdims=True) - hot
        weights -= RATE * (error.T @ inputs + weights) / num
        # A count that no example has would otherwise get a bias without end.
        biases -= RATE * (error.sum(0) + BIAS_PENALTY * biases) / num
    rows = tuple(tuple(round(float(w), 6) for w in row) for row in weights)
    return CountModel(weights=rows, biases=tuple(round(float(b), 6) for b in biases))


def predict(model: CountModel, inputs: np.ndarray) -> np.ndarray:
    """The policy's own choice at its default confidence."""
    return np.array([model.choose(row, 0.5) for row in inputs.tolist()])


def cross_validate(inputs: np.ndarray, labels: np.ndarray, db: np.ndarray, bound: float) -> None:
    """Prints what the choice for unseen prompts does."""
    chosen, fold = np.zeros_like(labels), np.arange(len(labels)) % FOLDS
    for part in range(FOLDS):
        model = fit(inputs[fold != part], labels[fold != part], db.shape[1] + 1)
        chosen[fold == part] = predict(model, inputs[fold == part])
    reached = np.concatenate((np.full((len(db), 1), np.inf), db), axis=1)[np.arange(len(db)), chosen]
    print(f"  labels {np.bincount(labels, minlength=db.shape[1] + 1)}, chosen {np.bincount(chosen)}")
    print(f"  exact {np.mean(chosen == labels):.0%}, too many {np.mean(chosen > labels):.0%}")
    sides = [("where it acts", reached[chosen > 0]), *((f"{n + 1} for all", db[:, n]) for n in range(db.shape[1]))]
    for name, values in sides:
        if len(values):
            print(f"  {name}: mean {values.mean():.1f} dB, below the bound {np.mean(values < bound):.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", type=Path, default=ROOT / "benchmarks" / "prompts.txt")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "skipvar.json")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--bound", type=float, default=26.0, help="dB to the full run that a count must reach")
    parser.add_argument("--num-scales", type=int, default=3, help="the most final scales that may go")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    prompts = read_prompt_file(args.prompts)
    pipe = Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        found = collect(pipe, prompts, args.seed, args.num_scales, args.batch)
    means, deviations = found.inputs.mean(0).round(6), found.inputs.std(0).round(6)
    inputs = (found.inputs - means) / deviations
    data: dict[str, Any] = {
        "features": list(FEATURES),
        "means": means.tolist(),
        "deviations": deviations.tolist(),
        "fitted": {"model": args.model, "prompts": len(prompts), "seed": args.seed, "bound_db": args.bound},
    }
    for name, db in (("scales", found.scales_db), ("branch", found.branch_db)):
        labels = largest_counts(db, args.bound)
        print(name)
        cross_validate(inputs, labels, db, args.bound)
        model = fit(inputs, labels, args.num_scales + 1)
        data[name] = {"weights": [list(row) for row in model.weights], "biases": list(model.biases)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(data, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
