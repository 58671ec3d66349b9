"""Fidelity figures against twins written as plain loops."""

import json

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from foveate.core.errors import FoveateError
from foveate.eval.fidelity import flip_maps, foreground_psnr, ms_ssim, psnr, ssim
from foveate.eval.pairs import fidelity, fidelity_report, score_pairs
from foveate.eval.statistics import summarise


def random_pairs(seed: int, num_images: int = 4, height: int = 24, width: int = 19) -> tuple[np.ndarray, np.ndarray]:
    """Images and references that differ by a different amount of noise each, on a white background."""
    rng = np.random.default_rng(seed)
    reference = np.full((num_images, height, width, 3), 255, np.uint8)
    reference[:, 4:18, 3:14] = rng.integers(0, 256, (num_images, 14, 11, 3))
    noise = rng.normal(0, 1, reference.shape) * np.linspace(3, 40, num_images)[:, None, None, None]
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


def plain_psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR of one pair by the definition."""
    squares = [(int(a) - int(b)) ** 2 for a, b in zip(image.ravel(), reference.ravel(), strict=True)]
    mean_square = sum(squares) / len(squares)
    return 100.0 if mean_square == 0 else min(100.0, 10 * np.log10(255 * 255 / mean_square))


def plain_ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of one pair, window by window, as Wang et al. 2004 write it; the border is reflected."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    border = ((5, 5), (5, 5), (0, 0))
    image, reference = np.pad(image, border, "reflect"), np.pad(reference, border, "reflect")
    values = []
    for channel in range(3):
        for top in range(image.shape[0] - 10):
            for left in range(image.shape[1] - 10):
                x = image[top : top + 11, left : left + 11, channel].astype(float)
                y = reference[top : top + 11, left : left + 11, channel].astype(float)
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                values.append(numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("seed", [0, 1])
def test_psnr_equals_plain_twin(seed: int) -> None:
    image, reference = random_pairs(seed)
    expected = [plain_psnr(one, other) for one, other in zip(image, reference, strict=True)]
    np.testing.assert_allclose(psnr(image, reference), expected, rtol=1e-6)
    assert expected[0] > expected[-1] + 10


@pytest.mark.parametrize("seed", [2, 3])
def test_ssim_equals_plain_twin(seed: int) -> None:
    image, reference = random_pairs(seed)
    expected = [plain_ssim(one, other) for one, other in zip(image, reference, strict=True)]
    np.testing.assert_allclose(ssim(image, reference), expected, rtol=1e-7)
    assert 0 < expected[-1] < 0.9 < expected[0] < 1


def test_equal_images_are_capped_and_the_smallest_difference_is_not() -> None:
    image = np.full((2, 64, 64, 3), 200, np.uint8)
    reference = image.copy()
    reference[1, 5, 5, 0] += 1
    values = psnr(image, reference)
    assert values[0] == 100.0
    assert values[1] == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3))
    assert ssim(image, reference)[0] == pytest.approx(1.0, abs=1e-12)


def test_psnr_above_the_cap_is_capped() -> None:
    image = np.zeros((1, 320, 320, 3), np.uint8)
    reference = image.copy()
    reference[0, 0, 0, 0] = 1
    assert 10 * np.log10(255**2 * 320 * 320 * 3) > 100
    assert psnr(image, reference)[0] == 100.0


def test_foreground_psnr_equals_plain_twin() -> None:
    image, reference = random_pairs(4)
    expected = []
    for one, other in zip(image, reference, strict=True):
        squares = []
        for row in range(one.shape[0]):
            for column in range(one.shape[1]):
                away = max(abs(255 - int(level)) for level in (*one[row, column], *other[row, column]))
                if away > 8:
                    squares.append(
                        [(int(a) - int(b)) ** 2 for a, b in zip(one[row, column], other[row, column], strict=True)]
                    )
        expected.append(10 * np.log10(255**2 / np.mean(squares)))
    np.testing.assert_allclose(foreground_psnr(image, reference), expected, rtol=1e-9)


def test_foreground_is_taken_from_both_images_and_ignores_background() -> None:
    reference = np.full((3, 20, 20, 3), 255, np.uint8)
    image = reference.copy()
    # A drawing that is missing from the reference counts on its own pixels only.
    image[0, :2, :5] = 0
    # Eight levels is still background, nine is not.
    image[1] -= 8
    image[2, 0, 0, 1] -= 9
    values = foreground_psnr(image, reference)
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[1] == pytest.approx(10 * np.log10(255**2 / 64))
    assert values[2] == pytest.approx(10 * np.log10(255**2 / 27))
    assert foreground_psnr(image, reference, background=(0, 0, 0))[0] == pytest.approx(psnr(image, reference)[0])


def test_summary_uses_linear_percentiles() -> None:
    summary = summarise([10.0, 0.0, 30.0, 20.0])
    assert (summary.mean, summary.p10, summary.min) == (15.0, pytest.approx(3.0), 0.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_what_it_cannot_summarise(values: list[float]) -> None:
    with pytest.raises(FoveateError):
        summarise(values)


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double()


def test_structure_is_that_of_torchmetrics_and_ms_ssim_needs_room() -> None:
    image, reference = random_pairs(6, num_images=2, height=177, width=192)
    how = {"data_range": 255.0, "reduction": "none"}
    expected = structural_similarity_index_measure(planes(image), planes(reference), **how)
    np.testing.assert_allclose(ssim(image, reference), expected, rtol=1e-9)
    expected = multiscale_structural_similarity_index_measure(planes(image), planes(reference), **how)
    np.testing.assert_allclose(ms_ssim(image, reference), expected, rtol=1e-6)
    assert 0.3 < expected[-1] < expected[0] < 1
    assert ms_ssim(reference, reference) == pytest.approx(1)
    with pytest.raises(FoveateError, match="at least 176 x 176"):
        ms_ssim(image[:, :175], reference[:, :175])


def test_flip_map_lies_where_the_images_differ_and_takes_bytes_as_they_are() -> None:
    reference = np.full((2, 64, 64, 3), 255, np.uint8)
    image = reference.copy()
    image[1, :32, :32] = 0
    maps = flip_maps(image, reference)
    assert maps.shape == (2, 64, 64)
    assert maps[0].max() == 0
    # White against black is the largest difference that there is; far away nothing is seen.
    assert maps[1, 8:24, 8:24].min() > 0.9
    assert maps[1, 48:, 48:].max() < 0.05
    small = np.clip(image.astype(int) - 3, 0, 255).astype(np.uint8)
    assert 0 < flip_maps(small, image).mean() < 0.1 < maps[1].mean()


def test_report_counts_identical_images_and_writes_the_agreed_keys() -> None:
    image, reference = random_pairs(5, num_images=5)
    image[1], image[3] = reference[1], reference[3]
    report = fidelity_report(image, reference)
    assert report.identical == 2
    data = json.loads(json.dumps(report.to_json()))
    assert list(data) == ["n", "psnr", "ssim", "foreground_psnr", "flip", "identical", "constant", "intervals"]
    assert (data["n"], data["identical"]) == (5, 2)
    for name, values in (
        ("psnr", psnr(image, reference)),
        ("ssim", ssim(image, reference)),
        ("foreground_psnr", foreground_psnr(image, reference)),
    ):
        assert data[name] == {
            "mean": pytest.approx(values.mean()),
            "p10": pytest.approx(np.percentile(values, 10)),
            "min": pytest.approx(values.min()),
        }
        low, high = data["intervals"][f"{name}.mean"]
        assert values.min() < low < values.mean() < high <= values.max()
    errors = flip_maps(image, reference).mean(axis=(1, 2))
    assert data["flip"] == {
        "mean": pytest.approx(errors.mean()), "p90": pytest.approx(np.percentile(errors, 90)),
        "max": pytest.approx(errors.max()),
    }  # fmt: skip
    assert "ms_ssim" in fidelity_report(*random_pairs(5, 1, 176, 176)).to_json()


def test_a_constant_image_is_reported_and_never_perfect() -> None:
    image, reference = random_pairs(7, num_images=4)
    image[0] = reference[0] = 200
    image[1] = 255
    image[2], reference[2] = 0, 1
    report = fidelity_report(image, reference)
    assert (report.constant_images, report.constant_references, report.identical) == (3, 2, 0)
    scored = psnr(image, reference)[[1, 3]]
    assert report.psnr.mean == pytest.approx(scored.mean())
    assert report.psnr.min == pytest.approx(scored.min())
    with pytest.raises(FoveateError, match="no pair can be scored: 1 references, and all of them have one colour"):
        fidelity_report(image[:1], reference[:1])


class Brightness:
    """A judge: how far the mean levels are apart."""

    name, is_error = "brightness", True

    def score(self, images, references, prompts):
        return np.abs(images.mean(axis=(1, 2, 3)) - references.mean(axis=(1, 2, 3))) / (1 if len(prompts) else 0)


def test_a_judge_is_one_more_figure() -> None:
    image, reference = random_pairs(8)
    pairs = score_pairs(image, reference, ["a"] * 4, [Brightness()])
    found = fidelity(pairs, 4, ["brightness"])
    expected = [abs(a.mean() - b.mean()) for a, b in zip(image, reference, strict=True)]
    assert found.to_json()["brightness"]["max"] == pytest.approx(max(expected))
    with np.errstate(divide="ignore"), pytest.raises(FoveateError, match="brightness must give one finite value"):
        score_pairs(image, reference, [], [Brightness()])


def test_bad_pairs_are_refused() -> None:
    image, reference = random_pairs(6)
    with pytest.raises((FoveateError, TypeCheckError)):
        psnr(image, reference[:3])
    with pytest.raises((FoveateError, TypeCheckError)):
        psnr(image.astype(np.float32), reference.astype(np.float32))
    with pytest.raises(FoveateError, match="at least one pair"):
        fidelity_report(image[:0], reference[:0])
    with pytest.raises(FoveateError, match="at least 11 x 11"):
        ssim(image[:, :10], reference[:, :10])
