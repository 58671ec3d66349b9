"""Code that has run on no device is asked for, and checked against plain torch at its first use.

A GPU is pretended by saying that triton interprets, and kernels are stand-ins: what matters is who is believed.
"""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.engine.executor import Engine
from foveate.engine.graphs import Graphs
from foveate.kernels import norm
from foveate.kernels.gpu import launch
from foveate.pipeline import placement
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from tests.engine.captures import Recalled
from tests.toys import make_request, toy


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Tensors on this CPU are served, in a process that has checked nothing yet."""
    monkeypatch.setattr(launch, "_interprets", lambda: True)
    monkeypatch.setattr(launch, "_checked", {})
    with torch.inference_mode(), caplog.at_level(logging.WARNING, logger="foveate"):
        yield caplog


def double(x_n: Tensor) -> Tensor:
    return x_n * 2


def double_(x_n: Tensor) -> Tensor:
    return x_n.mul_(2)


# Triton


def test_kernels_run_only_where_they_were_asked_for(gpu: pytest.LogCaptureFixture) -> None:
    x_n = torch.ones(3)
    assert not launch.serves(x_n)
    with launch.enabled(True):
        assert launch.serves(x_n)
        with launch.enabled(False):
            assert not launch.serves(x_n)
        assert launch.serves(x_n)
    assert not launch.serves(x_n)


@pytest.mark.parametrize("dtype", launch.TOLERANCES, ids=str)
def test_a_kernel_within_the_tolerance_is_believed(gpu: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    """Over the largest value: 40 here, so that a small one may be off by as much as a large one."""
    x_n = torch.tensor([20.0, 0.1, -3.0], dtype=dtype)
    off = 0.9 * 40 * launch.TOLERANCES[dtype]
    calls = []

    def kernel(x_n: Tensor) -> Tensor:
        calls.append(1)
        return (x_n.double() * 2 + off).to(x_n.dtype)

    for _ in range(2):
        assert torch.equal(launch.run("toy", kernel, double, x_n), kernel(x_n))
    assert len(calls) == 3 + 2, "checked once, then trusted"
    assert launch.warnings() == ()
    assert not gpu.records


def wrong(x_n: Tensor) -> Tensor:
    return x_n * 2 + 1e-3


def of_another_dtype(x_n: Tensor) -> Tensor:
    return (x_n * 2).half()


def broken(x_n: Tensor) -> Tensor:
    return (x_n * 2).index_fill(0, torch.tensor([1]), torch.nan)


def failing(x_n: Tensor) -> Tensor:
    x_n.fill_(9)
    raise TypeError("no such instruction\nand more")


@pytest.mark.parametrize("kernel", [wrong, of_another_dtype, broken, failing])
def test_a_kernel_that_fails_or_disagrees_is_left_alone(
    gpu: pytest.LogCaptureFixture, kernel: Callable[[Tensor], Tensor]
) -> None:
    x_n = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(3):
        assert torch.equal(launch.run("toy", kernel, double, x_n), torch.tensor([2.0, 4.0, 6.0]))
    assert torch.equal(x_n, torch.tensor([1.0, 2.0, 3.0])), "it was tried on copies"
    (warning,) = launch.warnings()
    assert warning.code == "kernels_plain"
    assert "'toy'" in warning.message
    assert ("no such instruction" in warning.message) == (kernel is failing)
    assert gpu.messages == [warning.message]
    assert "\n" not in warning.message


def test_kernels_in_place_are_checked_on_copies_and_per_dtype_and_width(gpu: pytest.LogCaptureFixture) -> None:
    seen = []

    def only_narrow_(x_n: Tensor) -> Tensor:
        seen.append(len(x_n))
        return x_n.mul_(2 if len(x_n) < 4 else 3)

    for size in (3, 4, 3, 4):
        x_n = torch.ones(size)
        launch.run("toy", only_narrow_, double_, x_n)
        assert torch.equal(x_n, torch.full((size,), 2.0))
    assert seen == [3, 3, 4, 3]
    assert len(launch.warnings()) == 1


def test_bits_may_differ_by_one_in_a_thousand(gpu: pytest.LogCaptureFixture) -> None:
    x_n = torch.zeros(4000)

    def bits(x_n: Tensor) -> Tensor:
        return x_n.long()

    def nearly(x_n: Tensor) -> Tensor:
        return bits(x_n).index_fill(0, torch.arange(4), 1)

    assert launch.run("near", nearly, bits, x_n).sum() == 4
    assert launch.run("far", lambda x_n: bits(x_n).index_fill(0, torch.arange(5), 1), bits, x_n).sum() == 0


def test_broken_inputs_do_not_accuse_a_kernel(gpu: pytest.LogCaptureFixture) -> None:
    x_n = torch.tensor([torch.nan, torch.inf, 1.0])
    launch.run("toy", lambda x_n: x_n + x_n, double, x_n)
    assert launch.warnings() == ()


def test_nothing_is_learnt_from_no_tokens(gpu: pytest.LogCaptureFixture) -> None:
    launch.run("toy", failing, double, torch.zeros(0))
    assert launch.warnings() == ()
    launch.run("toy", failing, double, torch.ones(2))
    assert len(launch.warnings()) == 1


def test_the_report_of_a_call_names_kernels_that_did_not_run(
    gpu: pytest.LogCaptureFixture, toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel fails here, so plain torch draws; a pipeline that did not ask knows nothing of it."""

    def missing(name: str) -> None:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(launch, "kernel", missing)
    pipe = Pipeline(toy_pipe.model, uses_triton=True)
    output = pipe("a red cat", seed=1, output_type="latent")
    said = [warning.message for warning in output.report.warnings if "Triton" in warning.message]
    assert {name for name in ("norm", "residual", "heads", "bits") if any(f"'{name}'" in line for line in said)} == {
        "norm",
        "residual",
        "heads",
        "bits",
    }
    assert output.config["kernels"] == "triton"
    plain = toy_pipe("a red cat", seed=1, output_type="latent")
    assert plain.config["kernels"] != "triton"
    assert not [warning for warning in plain.report.warnings if "Triton" in warning.message]
    assert not norm.launch.serves(torch.ones(2))


def test_who_asks_for_kernels_needs_a_gpu_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FoveateError, match="kernels must be None or \"triton\", got 'cuda'"):
        Pipeline.from_pretrained("emoji", kernels="cuda")
    with pytest.raises(FoveateError, match='load it with device="cuda", or leave kernels out'):
        Pipeline.from_pretrained("emoji", kernels="triton")
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(FoveateError, match="triton is not installed"):
        placement.wants_triton("triton", torch.device("cuda"))
    monkeypatch.setattr(launch, "has_triton", lambda: True)
    assert placement.wants_triton("triton", torch.device("cuda"))
    assert not placement.wants_triton(None, torch.device("cuda"))


# Graphs


@pytest.mark.parametrize("scale", [0, 2])
@pytest.mark.parametrize("breaks", ["logits", "keys"])
def test_a_graph_that_disagrees_with_the_plain_loop_is_never_replayed(
    scale: int, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one scale, in its logits or in a key that only later scales read."""
    subject = toy("square")
    captures = []

    def capture(work: Callable[[], Tensor]) -> Recalled:
        captures.append(1)
        is_bad = len(captures) == scale + 1

        def replayed() -> Tensor:
            out = work()
            if is_bad and breaks == "keys":
                keys = graphs._leased.cache.k_RNMD[1]  # type: ignore[union-attr]
                keys[0, 0, 0, 0] += 1e-2
            return out + 1e-2 if is_bad and breaks == "logits" else out

        return Recalled(work=replayed, out=work())

    graphs = Graphs(capture)
    graphed, plain = Engine(subject.model, subject.tokenizer, graphs), Engine(subject.model, subject.tokenizer)
    bound = load_policy("full").bind(subject.schedule, subject.model.shape)
    for seed in (3, 5, 7):
        request = make_request(subject.schedule, (seed,), (5,))
        for ours, theirs in zip(graphed.run(bound, request), plain.run(bound, request), strict=True):
            assert torch.equal(ours.f_hat_BZHW, theirs.f_hat_BZHW)
    (warning,) = graphs.warnings()
    assert warning.code == "graphs_plain"
    assert "differs from the plain loop by more than 1e-05" in warning.message
    assert [record.getMessage() for record in caplog.records] == [warning.message]
    assert len(captures) == scale + 1
