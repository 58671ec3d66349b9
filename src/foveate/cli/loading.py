"""Flags to a loaded pipeline, and what is refused before its weights are read."""

from collections.abc import Sequence

import torch

from foveate.cli.options import ModelOptions
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.families.loading import Origin, find_spec
from foveate.families.memory import memory_need
from foveate.families.spec import ModelSpec
from foveate.pipeline.call import Prompts, resolve
from foveate.pipeline.loading import MAX_THREADS, Loading
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline


def spec_of(options: ModelOptions) -> ModelSpec:
    """Shapes and defaults of the model that the flags ask for, without its weights.

    Raises:
        FoveateError: There is no such model.
    """
    origin = Origin(
        name_or_path=options.model,
        autoencoder=options.autoencoder,
        text_encoder=options.text_encoder,
        revision=options.revision,
        local_files_only=options.local_files_only,
    )
    return find_spec(origin)


def check_call(prompts: Prompts, call: Options, policies: Sequence[Policy], spec: ModelSpec) -> None:
    """Refuses what a model of these shapes would refuse of a call, and policies that do not fit its scales.

    Raises:
        FoveateError: A value out of range, a size that there is not, or a policy that does not fit.
    """
    schedule = resolve(prompts, call, spec).schedule
    for policy in policies:
        # Counting what is held in memory binds the policy to the shapes.
        memory_need(spec, torch.float32, policy, schedule=schedule)


def open_pipeline(options: ModelOptions, *, is_quiet: bool) -> Pipeline:
    """Loads the model that the flags ask for; sets the number of threads of this process.

    Raises:
        FoveateError: There is no such model, or a flag is out of range.
    """
    pipe = loading_of(options).open()
    pipe.set_progress_bar_config(disable=True if is_quiet else None)
    return pipe


def loading_of(options: ModelOptions) -> Loading:
    """The flags as any process can load the model from them.

    Raises:
        FoveateError: A flag is out of range, or needs a GPU.
    """
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise FoveateError(f"--threads must be 1 to {MAX_THREADS}, got {options.threads}")
    _refuse_without_gpu(options)
    names = ("autoencoder", "text_encoder", "weights", "dtype", "decoder_dtype", "quantization", "kernels", "revision",
             "local_files_only", "offload", "release_text_encoder")  # fmt: skip
    return Loading(
        model=options.model,
        options={**{name: getattr(options, name) for name in names}, "device": options.device or "cpu"},
        threads=options.threads,
        cuda_graphs=options.cuda_graphs,
    )


def _refuse_without_gpu(options: ModelOptions) -> None:
    """Refuses flags for a GPU on a CPU, and those that exclude each other.

    Raises:
        FoveateError: It names the flag.
    """
    flags = {
        "--offload": options.offload,
        "--cuda-graphs": options.cuda_graphs,
        f"--kernels {options.kernels}": options.kernels is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if given and options.device in (None, "cpu"):
        raise FoveateError(f"{given[0]} needs a GPU; add --device cuda, or leave {given[0]} out")
    if options.offload and options.cuda_graphs:
        raise FoveateError("--cuda-graphs needs weights that stay on the GPU; leave --offload or --cuda-graphs out")
