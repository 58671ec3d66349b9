"""CPU offload: keeps modules in main memory and moves those in use to the device.

The hooks of accelerate do this around `forward`; engine and tokenizers here call other methods of their modules, so the
pipeline says which part works next.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from foveate.families.loading import LoadedModel

HOME = torch.device("cpu")

TEXT_ENCODER, TRANSFORMER, CODEBOOK, DECODER = "text_encoder", "transformer", "codebook", "decoder"
"""The parts. The codebook is what every scale reads of the autoencoder, the decoder is the rest of it."""

Move = Callable[[nn.Module, torch.device], Any]


class Offload:
    """Tracks which modules are on the device; all others are in main memory."""

    def __init__(
        self, parts: Mapping[str, Sequence[nn.Module]], device: torch.device, move: Move = nn.Module.to
    ) -> None:
        """Moves all modules to the CPU.

        Args:
            parts: Modules by name; no module is in two of them.
            device: Where parts work.
            move: Moves a module to a device, in place.
        """
        self._parts, self._device, self._move = dict(parts), device, move
        self._there = list(self._parts)
        self._held: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self.bring()

    @classmethod
    def of(cls, model: LoadedModel) -> "Offload":
        """Offload of a loaded model, wherever its modules are."""
        return cls(parts_of(model), model.device)

    @contextmanager
    def working(self, *names: str) -> Iterator[None]:
        """Has these modules on the device inside, and no others but those of an enclosing `working`.

        Calls of other threads wait. In one thread a block may lie in another: a call that was given up ends, and moves
        its modules back to the CPU, where the collector finds it, which may be in the middle of another call's work.
        """
        with self._lock:
            before = self._held
            self._held = tuple(dict.fromkeys((*before, *names)))
            try:
                self.bring(*self._held)
                yield
            finally:
                self._held = before

    # A tensor that is made in inference mode could not be changed outside of it any more.
    @torch.inference_mode(mode=False)
    def bring(self, *names: str) -> None:
        """Moves all other modules back to the CPU first, then these to the device, in this order; those there stay.

        If a move fails, its part counts as being there, so that the next call moves back what had arrived.
        """
        for name in [name for name in self._there if name not in names]:
            for module in self._parts[name]:
                self._move(module, HOME)
            self._there.remove(name)
        for name in [name for name in names if name not in self._there]:
            self._there.append(name)
            for module in self._parts[name]:
                self._move(module, self._device)


def parts_of(model: LoadedModel) -> dict[str, list[nn.Module]]:
    """The modules of every part; a part without weights has none."""
    (autoencoder,) = modules_of(model.tokenizer)
    codebook = model.spec.kind.codebook(autoencoder)
    return {
        TEXT_ENCODER: modules_of(model.text),
        TRANSFORMER: modules_of(model.transformer),
        CODEBOOK: list(codebook),
        DECODER: [child for child in autoencoder.children() if child not in codebook],
    }


def modules_of(part: object, depth: int = 2) -> list[nn.Module]:
    """The part itself, or the modules that it and the objects in it hold: some parts are two encoders in one."""
    if isinstance(part, nn.Module):
        return [part]
    if depth == 0:
        return []
    names = [field.name for field in fields(part)] if is_dataclass(part) else list(getattr(part, "__dict__", ()))
    return [module for name in names for module in modules_of(getattr(part, name), depth - 1)]
