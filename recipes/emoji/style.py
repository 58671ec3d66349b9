"""Which style an image is drawn in: a linear probe on frozen features, fitted on real art.

Axes: n images, F features, s styles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from foveate.core.errors import FoveateError

RIDGE = 0.1
"""Weight of the penalty, relative to the mean variance of a standardised feature."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StyleProbe:
    """Least squares to one-hot styles; the largest output names the style."""

    styles: tuple[str, ...]
    mean_F: Float[np.ndarray, " F"]
    weight_Fs: Float[np.ndarray, "F s"]
    bias_s: Float[np.ndarray, " s"]

    def predict(self, features_nF: Float[np.ndarray, "n F"]) -> list[str]:
        """Names the style of each image."""
        scores_ns = (features_nF - self.mean_F) @ self.weight_Fs + self.bias_s
        return [self.styles[i] for i in scores_ns.argmax(1)]

    def accuracy(self, features_nF: Float[np.ndarray, "n F"], styles: Sequence[str]) -> float:
        """Share of the images whose style is recognised."""
        return float(np.mean([a == b for a, b in zip(self.predict(features_nF), styles, strict=True)]))


def fit_style_probe(features_nF: Float[np.ndarray, "n F"], styles: Sequence[str]) -> StyleProbe:
    """Fits the probe in closed form, in float64.

    Args:
        features_nF: Features of real art.
        styles: The style of each.

    Raises:
        FoveateError: If there are fewer than two styles, or not one style per row.
    """
    names = tuple(sorted(set(styles)))
    if len(names) < 2 or len(styles) != len(features_nF):
        raise FoveateError(f"a probe needs two styles and one per row, got {len(names)} and {len(styles)} rows")
    x_nF = features_nF.astype(np.float64)
    mean_F = x_nF.mean(0)
    x_nF = x_nF - mean_F
    y_ns = np.array([[float(style == name) for name in names] for style in styles])
    bias_s = y_ns.mean(0)
    gram_FF = x_nF.T @ x_nF / len(x_nF)
    penalty = RIDGE * np.trace(gram_FF) / len(gram_FF)
    weight_Fs = np.linalg.solve(gram_FF + penalty * np.eye(len(gram_FF)), x_nF.T @ (y_ns - bias_s) / len(x_nF))
    return StyleProbe(styles=names, mean_F=mean_F, weight_Fs=weight_Fs, bias_s=bias_s)
