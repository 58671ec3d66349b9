"""Flags to a loaded pipeline."""

import torch

from foveate.cli.options import ModelOptions
from foveate.core.errors import FoveateError
from foveate.pipeline import Pipeline


def open_pipeline(options: ModelOptions, *, is_quiet: bool) -> Pipeline:
    """Loads the model that the flags ask for; sets the number of threads of this process.

    Raises:
        FoveateError: There is no such model, or a flag is out of range.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise FoveateError(f"--threads must be 1 or more, got {options.threads}")
        torch.set_num_threads(options.threads)
    pipe = Pipeline.from_pretrained(
        options.model,
        autoencoder=options.autoencoder,
        text_encoder=options.text_encoder,
        weights=options.weights,
        dtype=options.dtype,
        decoder_dtype=options.decoder_dtype,
        quantization=options.quantization,
        fp8_scales=options.fp8_scales,
        device=options.device,
        revision=options.revision,
        local_files_only=options.local_files_only,
        offload=options.offload,
        release_text_encoder=options.release_text_encoder,
    )
    if options.cuda_graphs:
        pipe.enable_cuda_graphs()
    if is_quiet:
        pipe.set_progress_bar_config(disable=True)
    return pipe
