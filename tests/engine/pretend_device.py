"""A second device that is not there: tensors that claim to lie on it, computed on the CPU; waits of the host noted.

Run as a program it draws with the toys on that device and prints, as JSON, per policy and scale what made the host
wait, and whether the latents equal those of the CPU; with graphs also what crossed between host and device while one
was replayed, which a real graph could not. It runs in a process of its own, as torch cannot forget a device.
A tensor of the host that meets one of the device in an operation raises, as it would on a GPU.
"""

import copy
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from foveate.engine.executor import Engine
from foveate.engine.graphs import Graphs
from foveate.policies.registry import load_policy
from tests.engine.captures import Recalled
from tests.toys import Toy, label_request, make_request, toy, toy_var

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique",
         "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere", "allclose"}  # fmt: skip
"""Operations whose answer, or whose answer's shape, the host has to know."""


class Pretended(Tensor):
    """Claims to lie on the device; `inner` holds the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        # A view of an ordinary tensor has to be an ordinary one, too.
        with torch.inference_mode(mode=False):
            made = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=torch.device("pretend:0"),
            )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the mode")


def on_cpu(x):
    """What really lies or shall lie on the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.inner if isinstance(x, Pretended) else x


def wrapped(x):
    """Puts a result on the device."""
    return Pretended(x) if isinstance(x, Tensor) else x


class Watch(TorchDispatchMode):
    """Computes what happens on the device and counts, in `waits`, what makes the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.crossings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        given = [x for x in leaves if isinstance(x, Tensor)]
        inside = [x for x in given if isinstance(x, Pretended)]
        target = next((x for x in leaves if isinstance(x, torch.device)), None)
        goes_there = bool(inside) if target is None else target.type == "pretend"
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        self._note(func, given, inside, target, named)
        plain_args, plain_kwargs = tree_map(on_cpu, (args, kwargs or {}))
        out = func(*plain_args, **plain_kwargs)
        # What an operation changed in place is the same tensor as before.
        known = {id(x.inner): x for x in inside}
        return tree_map(lambda x: known[id(x)] if id(x) in known else wrapped(x), out) if goes_there else out

    def _note(self, func, given, inside, target, named) -> None:
        name = func.overloadpacket.__name__
        moves = name in ("_to_copy", "to", "copy_")
        if inside and len(inside) < len(given) and not moves:
            strangers = [x for x in given if not isinstance(x, Pretended) and x.dim() > 0]
            assert not strangers, f"{func} got tensors of two devices"
        if inside and name in WAITS:
            self.waits[name] += 1
        if inside and "Tensor" in func._overloadname and name == "repeat_interleave" and not named.get("output_size"):
            self.waits[name] += 1
        if inside and name in ("index", "index_put", "index_put_", "_index_put_impl_") and has_mask(named):
            self.waits["index by mask"] += 1
        if moves:
            self._note_move(name, given, inside, target, named)

    def _note_move(self, name, given, inside, target, named) -> None:
        if name == "copy_":
            crosses = 0 < len(inside) < len(given)
        else:
            crosses = target is not None and (target.type == "pretend") != bool(inside)
        self.crossings += crosses
        to_host = crosses and (not isinstance(given[0], Pretended) if name == "copy_" else bool(inside))
        if to_host:
            self.waits["copy to the host"] += 1
        elif crosses and not named.get("non_blocking"):
            self.waits["copy to the device that waits"] += 1


def has_mask(named) -> bool:
    """Whether the indices of an operation are masks, whose size only the device knows."""
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in named["indices"])


def self_check() -> dict[str, list[str]]:
    """What the watch notes for operations that are known to make the host wait, and for some that do not."""
    noted = {}
    with Watch() as watch, torch.inference_mode():
        there = torch.device("pretend:0")
        x_n = torch.arange(4).to(there, non_blocking=True)
        cases = {
            "item": lambda: x_n.sum().item(),
            "bool": lambda: bool((x_n > 1).all()),
            "nonzero": x_n.nonzero,
            "mask": lambda: x_n[x_n > 1],
            "put by mask": lambda: x_n.clone().__setitem__(x_n > 1, x_n[:2]),
            "to the host": x_n.cpu,
            "copy to the host": lambda: torch.zeros(4, dtype=torch.long).copy_(x_n),
            "to the device": lambda: torch.arange(4).to(there),
            "repeat": lambda: torch.repeat_interleave(x_n, x_n),
            "index by numbers": lambda: x_n[x_n],
            "repeat to a known size": lambda: torch.repeat_interleave(x_n, x_n, output_size=6),
            "behind the host's back": lambda: torch.arange(4).to(there, non_blocking=True),
        }
        for name, case in cases.items():
            watch.waits.clear()
            case()
            noted[name] = sorted(watch.waits)
    return noted


def moved(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights claim to lie on the device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(Pretended(weight.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretended(buffer)
    return module


def moved_toy(subject: Toy) -> Toy:
    tokenizer = copy.copy(subject.tokenizer)
    tokenizer.autoencoder = moved(tokenizer.autoencoder)
    return replace(subject, model=moved(subject.model), tokenizer=tokenizer)


@dataclass(kw_only=True)
class Replays:
    """Captures by remembering, and notes what happens between host and device in every replay."""

    watch: Watch
    count: int = 0
    waits: int = 0
    crossings: int = 0

    def __call__(self, work) -> "Replays.Noted":
        """Captures."""
        return Replays.Noted(replays=self, captured=Recalled.capture(work))

    @dataclass(kw_only=True)
    class Noted:
        """Captured work."""

        replays: "Replays"
        captured: Recalled

        @property
        def out(self) -> Tensor:
            """What was computed last."""
            return self.captured.out

        def replay(self) -> None:
            """Computes it again."""
            watch = self.replays.watch
            before = watch.waits.total(), watch.crossings
            self.captured.replay()
            self.replays.count += 1
            self.replays.waits += watch.waits.total() - before[0]
            self.replays.crossings += watch.crossings - before[1]


def draw(spec: str, subject: Toy, *, is_graphed: bool) -> dict[str, object]:
    """What every scale waited for, and whether the device made what the CPU makes."""
    with Watch():
        there = moved_toy(subject)
    watch = Watch()
    request = label_request(subject.schedule) if subject.name == "var" else make_request(subject.schedule)
    request = replace(request, wants_maps=False)
    bound = load_policy(spec).bind(subject.schedule, subject.model.shape)
    expected = [step.f_hat_BZHW for step in Engine(subject.model, subject.tokenizer).run(bound, request)]
    conditions = tuple(Pretended(c) if isinstance(c, Tensor) else c for c in request.conditions)
    scales, is_same = [], True
    replays = Replays(watch=watch)
    engine = Engine(there.model, there.tokenizer, Graphs(replays) if is_graphed else None)
    request = replace(request, conditions=conditions)
    with watch:
        if is_graphed:
            # The first request shows the shape, the second is captured, the third finds the graphs.
            for _ in range(2):
                list(engine.run(bound, request))
            watch.waits.clear()
        run = engine.run(bound, request)
        for step, theirs in zip(run, expected, strict=True):
            scales.append(dict(watch.waits))
            watch.waits.clear()
            is_same = is_same and bool(torch.equal(step.f_hat_BZHW.inner, theirs))
            watch.waits.clear()
    return {
        "spec": spec,
        "toy": subject.name,
        "is_static": bound.is_static,
        "scales": scales,
        "is_same": is_same,
        "replays": replays.count,
        "in_replays": [replays.waits, replays.crossings],
    }


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("pretend")
    torch.get_device_module("pretend").get_amp_supported_dtype = lambda: [torch.bfloat16]
    sys.stdout.write(json.dumps(self_check()) + "\n")
    for line in json.loads(sys.argv[1]):
        chosen = toy_var() if line[1] == "var" else toy(line[1])
        sys.stdout.write(json.dumps(draw(line[0], chosen, is_graphed="graphs" in line)) + "\n")
