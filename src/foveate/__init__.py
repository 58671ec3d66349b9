"""foveate runs next-scale image models and spends compute only where it changes the image.

The public names are loaded when they are first used, so that `import foveate` is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from foveate.core.version import __version__

if TYPE_CHECKING:
    from foveate.adapters.attachment import attach as attach
    from foveate.core.errors import Cancelled as Cancelled
    from foveate.core.errors import FoveateError as FoveateError
    from foveate.eval.compare import compare as compare
    from foveate.eval.sweep import sweep as sweep
    from foveate.eval.tune import tune as tune
    from foveate.pipeline.fit_budget import fit_budget as fit_budget
    from foveate.pipeline.guard import Guard as Guard
    from foveate.pipeline.options import CallOptions as CallOptions
    from foveate.pipeline.options import Options as Options
    from foveate.pipeline.pipeline import Pipeline as Pipeline
    from foveate.policies.attention_entropy import AttentionEntropyTokens as AttentionEntropyTokens
    from foveate.policies.blocks_per_scale import BlocksPerScale as BlocksPerScale
    from foveate.policies.cached_guidance import CachedGuidance as CachedGuidance
    from foveate.policies.depthvar import DepthVAR as DepthVAR
    from foveate.policies.drop_branch import DropBranch as DropBranch
    from foveate.policies.fastvar import FastVAR as FastVAR
    from foveate.policies.feature_magnitude import FeatureMagnitude as FeatureMagnitude
    from foveate.policies.fovea import Fovea as Fovea
    from foveate.policies.full import Full as Full
    from foveate.policies.kv_eviction import KVEviction as KVEviction
    from foveate.policies.late_bfloat16 import LateBfloat16 as LateBfloat16
    from foveate.policies.ld_pruning import LDPruning as LDPruning
    from foveate.policies.random_tokens import RandomTokens as RandomTokens
    from foveate.policies.registry import load_policy as load_policy
    from foveate.policies.skip_scales import SkipScales as SkipScales
    from foveate.policies.skipvar import SkipVAR as SkipVAR
    from foveate.policies.sparsevar import SparseVAR as SparseVAR
    from foveate.policies.step_down import StepDown as StepDown
    from foveate.policies.token_variance import TokenVariance as TokenVariance
    from foveate.policies.uniform_depth import UniformDepth as UniformDepth

_HOMES = {
    "AttentionEntropyTokens": "foveate.policies.attention_entropy",
    "BlocksPerScale": "foveate.policies.blocks_per_scale",
    "CachedGuidance": "foveate.policies.cached_guidance",
    "CallOptions": "foveate.pipeline.options",
    "Cancelled": "foveate.core.errors",
    "DepthVAR": "foveate.policies.depthvar",
    "DropBranch": "foveate.policies.drop_branch",
    "FastVAR": "foveate.policies.fastvar",
    "FeatureMagnitude": "foveate.policies.feature_magnitude",
    "FoveateError": "foveate.core.errors",
    "Full": "foveate.policies.full",
    "Fovea": "foveate.policies.fovea",
    "KVEviction": "foveate.policies.kv_eviction",
    "Guard": "foveate.pipeline.guard",
    "LDPruning": "foveate.policies.ld_pruning",
    "LateBfloat16": "foveate.policies.late_bfloat16",
    "Options": "foveate.pipeline.options",
    "Pipeline": "foveate.pipeline.pipeline",
    "RandomTokens": "foveate.policies.random_tokens",
    "SkipScales": "foveate.policies.skip_scales",
    "SkipVAR": "foveate.policies.skipvar",
    "SparseVAR": "foveate.policies.sparsevar",
    "StepDown": "foveate.policies.step_down",
    "TokenVariance": "foveate.policies.token_variance",
    "UniformDepth": "foveate.policies.uniform_depth",
    "attach": "foveate.adapters.attachment",
    "compare": "foveate.eval.compare",
    "fit_budget": "foveate.pipeline.fit_budget",
    "load_policy": "foveate.policies.registry",
    "sweep": "foveate.eval.sweep",
    "tune": "foveate.eval.tune",
}

__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604 - a list of strings, made from the table above


def __getattr__(name: str) -> object:
    """Imports a public name's module when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
