"""What ran, per scale, branch and block; reads and writes JSON.

The engine counts while it runs, from the shapes of what it computes, and never from the plan.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.cost import Cost, ModelShape, Row, RowWork, ScaleWork, flops_by_image, request_cost
from foveate.core.policy import Directive
from foveate.core.schedule import Grid


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleTrace:
    """One scale that was reached: what ran, and for how long.

    `keep_Bl` and `depth_Bl` (blocks run per token, conditional branch) are kept only if the request asked for maps.
    `narrow_dtype` is what blocks ran in that a plan narrowed; `lost_copies` counts dropped tokens whose source for a
    copy did not run either, so that they committed zero. `refiner_ms` is the part of `ms` that a family's refiner took.
    """

    scale: int
    grid: Grid
    ran: bool
    work: ScaleWork
    ms: float = 0.0
    refiner_ms: float = 0.0
    narrow_dtype: str | None = None
    lost_copies: int = 0
    keep_Bl: Bool[Tensor, "B l"] | None = None
    depth_Bl: Int[Tensor, "B l"] | None = None


@dataclass(kw_only=True, slots=True)
class Trace:
    """All scales of a request, the text lengths of its rows, and which directives of the policy had no effect.

    `peak_cache_bytes` is what was kept between scales beside keys and values: text keys and values, modulation, and the
    blocks' changes that a policy reads again. `unfired_by_image` says
    what had no effect on each image, where images ran as requests of their own. `stopped` holds the images whose
    unconditional branch a plan stopped (not those where guidance itself ended).
    """

    shape: ModelShape
    text_tokens: dict[Row, int]
    bytes_per_element: int
    scales: list[ScaleTrace] = field(default_factory=list)
    peak_kv_bytes: int = 0
    peak_cache_bytes: int = 0
    text_ms: float = 0.0
    decoder_ms: float = 0.0
    unfired: tuple[str, ...] = ()
    unfired_by_image: tuple[tuple[str, ...], ...] = ()
    stopped: frozenset[int] = frozenset()

    @property
    def transformer_ms(self) -> float:
        """Milliseconds of all scales, the refiner left out."""
        return sum(s.ms - s.refiner_ms for s in self.scales)

    @property
    def refiner_ms(self) -> float:
        """Milliseconds of the family's refiner; 0 where it has none."""
        return sum(s.refiner_ms for s in self.scales)

    @property
    def cost(self) -> Cost:
        """Tokens, FLOPs and cache bytes that were counted."""
        return request_cost([s.work for s in self.scales], self.shape, self.text_tokens, self.bytes_per_element)

    @property
    def flops_by_image(self) -> tuple[int, ...]:
        """FLOPs that were counted for each image."""
        return flops_by_image([s.work for s in self.scales], self.shape, self.text_tokens)

    def fired(self) -> set[Directive]:
        """The directives that took effect in some plan."""
        found: set[Directive] = set()
        images = {image for image, _ in self.text_tokens}
        for s in self.scales:
            if not s.ran:
                found.add(Directive.SCALES)
                continue
            if self.stopped - {image for image, is_cond in s.work.rows if not is_cond}:
                found.add(Directive.BRANCH)
            found |= self._fired_inside(s, images)
        return found

    def _fired_inside(self, s: ScaleTrace, images: set[int]) -> set[Directive]:
        """The directives that took effect within a scale that ran."""
        rows = s.work.rows
        conditional = [rows[(image, True)] for image in images]
        pairs = [
            (self._own_tokens(s, (i, True)), self._own_tokens(s, (i, False))) for i in images if (i, False) in rows
        ]
        happened = {
            Directive.TOKENS: any(row.head_tokens < s.work.grid_tokens for row in conditional),
            Directive.BLOCKS: any(tokens < row.head_tokens for row in conditional for tokens in row.block_tokens),
            Directive.SUBLAYERS: any(row.sublayer_tokens for row in conditional),
            Directive.GUIDED_TOKENS: any(un < cond for cond, un in pairs),
            Directive.KEYS: bool(s.work.evicted) and self.shape.is_cached,
            Directive.DTYPE: s.narrow_dtype is not None,
        }
        return {directive for directive, is_so in happened.items() if is_so}

    def _own_tokens(self, s: ScaleTrace, row: Row) -> int:
        """The most tokens of a row that a block ran, a text in front of the first scale left out."""
        ahead = self.shape.prefix_tokens(self.text_tokens[row]) if s.scale == 0 else 0
        return max(s.work.rows[row].block_tokens) - ahead

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back (maps are left out)."""
        return {
            "shape": {name: getattr(self.shape, name) for name in self.shape.__slots__},
            "text_tokens": [[*row, tokens] for row, tokens in self.text_tokens.items()],
            "bytes_per_element": self.bytes_per_element,
            "ms": {
                "text": self.text_ms,
                "transformer": self.transformer_ms,
                "refiner": self.refiner_ms,
                "decoder": self.decoder_ms,
            },
            "peak_kv_bytes": self.peak_kv_bytes,
            "peak_cache_bytes": self.peak_cache_bytes,
            "unfired": list(self.unfired),
            "stopped": sorted(self.stopped),
            "scales": [
                {
                    "scale": s.scale,
                    "grid": list(s.grid),
                    "ran": s.ran,
                    "ms": s.ms,
                    "refiner_ms": s.refiner_ms,
                    "narrow_dtype": s.narrow_dtype,
                    "lost_copies": s.lost_copies,
                    "evicted": list(s.work.evicted),
                    "rows": [
                        {
                            "image": image,
                            "conditional": c,
                            "head_tokens": r.head_tokens,
                            "refined_tokens": r.refined_tokens,
                            "block_tokens": list(r.block_tokens),
                            "attended_twice": list(r.attended_twice),
                            "sublayer_tokens": {str(b): list(counts) for b, counts in r.sublayer_tokens.items()},
                        }
                        for (image, c), r in s.work.rows.items()
                    ],
                }
                for s in self.scales
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Trace":
        """Reads what `to_json` wrote."""
        trace = cls(
            shape=_shape_of(data["shape"]),
            text_tokens={(image, bool(c)): tokens for image, c, tokens in data["text_tokens"]},
            bytes_per_element=data["bytes_per_element"],
            peak_kv_bytes=data["peak_kv_bytes"],
            peak_cache_bytes=data["peak_cache_bytes"],
            text_ms=data["ms"]["text"],
            decoder_ms=data["ms"]["decoder"],
            unfired=tuple(data["unfired"]),
            stopped=frozenset(data["stopped"]),
        )
        for s in data["scales"]:
            rows = {
                (r["image"], r["conditional"]): RowWork(
                    block_tokens=tuple(r["block_tokens"]),
                    head_tokens=r["head_tokens"],
                    refined_tokens=r.get("refined_tokens", 0),
                    attended_twice=tuple(r.get("attended_twice", ())),
                    sublayer_tokens={int(b): tuple(counts) for b, counts in r.get("sublayer_tokens", {}).items()},
                )
                for r in s["rows"]
            }
            grid = (s["grid"][0], s["grid"][1])
            work = ScaleWork(
                scale=s["scale"],
                grid_tokens=grid[0] * grid[1] if s["ran"] else 0,
                rows=rows,
                evicted=tuple(s.get("evicted", ())),
            )
            trace.scales.append(
                ScaleTrace(
                    scale=s["scale"],
                    grid=grid,
                    ran=s["ran"],
                    work=work,
                    ms=s["ms"],
                    refiner_ms=s.get("refiner_ms", 0.0),
                    narrow_dtype=s.get("narrow_dtype"),
                    lost_copies=s.get("lost_copies", 0),
                )
            )
        return trace

    def dumps(self) -> str:
        """The trace as one JSON line."""
        return json.dumps(self.to_json(), separators=(",", ":"))


def _shape_of(data: dict[str, Any]) -> ModelShape:
    """A shape from plain data; lists were tuples."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return ModelShape(**fields)


def unfired(trace: Trace, directives: Sequence[Directive]) -> tuple[str, ...]:
    """Directives that had no effect, as text."""
    return tuple(d.value for d in directives if d not in trace.fired())
