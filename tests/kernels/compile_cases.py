"""Compiles every Triton kernel for NVIDIA GPUs, without one: `test_gpu.py` runs this in a process of its own.

Prints, as JSON, per kernel, variant and target the bytes of machine code, the widest load in bytes, and whether the
assembly keeps anything in local memory, which would be slow.
"""

import itertools
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveate.kernels.gpu import bits, energy, heads, norm, residual

ALIGNED = [["tt.divisibility", 16]]
FLAGS = (True, False)
FLOATS = ("eps", "top_p")
NUMBERS = {"row_ptr": "*i64", "bits_ptr": "*i64"}
"""Pointers to something else than float32, wherever they occur."""


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, pointers of another type and constants; sizes are those of Infinity-2B and -8B."""
    found = []
    for out, has_lookup, block in itertools.product(("*bf16", "*fp16", "*fp32"), FLAGS, (2048, 4096)):
        constants = {"HAS_LOOKUP": has_lookup, "BLOCK": block}
        found.append(("norm", norm._norm, {"out_ptr": out}, constants))
    for change, has_gate in itertools.product(("*bf16", "*fp32"), FLAGS):
        constants = {"HAS_GATE": has_gate, "HAS_LOOKUP": has_gate, "BLOCK": 2048}
        found.append(("residual", residual._add_gated, {"change_ptr": change}, constants))
    for dtype, rotates, num_heads in itertools.product(("*bf16", "*fp16", "*fp32"), FLAGS, (16, 32)):
        constants = {"HAS_ROTATION": rotates, "HEADS": num_heads, "PAIRS": 64}
        found.append(("heads", heads._unit_rotated, {"qkv_ptr": dtype}, constants))
    found.append(("bits", bits._sample_bits, {}, {"BLOCK": 1024}))
    found.append(("energy", energy._smooth_energy, {"out_ptr": "*fp64"}, {"BLOCK": 128}))
    return found


def type_of(name: str) -> str:
    """The type of an argument, as its name says."""
    if name.endswith("_ptr"):
        return NUMBERS.get(name, "*fp32")
    return "fp32" if name in FLOATS else "i32"


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, object]:
    """Machine code of one variant; pointers and whole numbers are taken as multiples of 16, as those of a model are."""
    given = dict.fromkeys(constants, "constexpr") | pointers
    signature = {name: given.get(name) or type_of(name) for name in kernel.arg_names}
    aligned = {(i,): ALIGNED for i, name in enumerate(kernel.arg_names) if signature[name].startswith(("*", "i32"))}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    loads = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", built.asm["ptx"])
    widest = max(int(count or 1) * int(num_bits) // 8 for count, num_bits in loads)
    return {"cubin": len(built.asm["cubin"]), "widest_load": widest, "has_local": ".local" in built.asm["ptx"]}


if __name__ == "__main__":
    for capability, (name, kernel, pointers, constants) in itertools.product((80, 90), variants()):
        line = {"kernel": name, "target": capability, "variant": str(constants | pointers)}
        sys.stdout.write(json.dumps(line | compiled(kernel, pointers, constants, capability)) + "\n")
