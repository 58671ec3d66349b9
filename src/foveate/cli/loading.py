"""Flags to a loaded pipeline, and to the options of its calls."""

import torch

from foveate.cli.options import ModelOptions, SamplingOptions, SizeOptions, numbers
from foveate.core.errors import FoveateError
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline


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
        device=options.device or "cpu",
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


def call_options(size: SizeOptions, sampling: SamplingOptions) -> Options:
    """Size and sampling in the words of the pipeline.

    Raises:
        FoveateError: A flag is not written as it should be.
    """
    width, height = size.width_and_height() or (None, None)
    return Options(
        width=width,
        height=height,
        aspect_ratio=size.aspect_ratio,
        pixels=size.pixels,
        guidance_scale=numbers("--guidance-scale", sampling.guidance_scale, float),
        temperature=numbers("--temperature", sampling.temperature, float),
        top_k=numbers("--top-k", sampling.top_k, int),
        top_p=numbers("--top-p", sampling.top_p, float),
        negative_prompt=sampling.negative_prompt,
        more_smooth=sampling.more_smooth,
    )
