"""Keyword arguments of diffusers' pipelines that foveate has not, each with what to do instead."""

from collections.abc import Iterable, Mapping
from typing import TypedDict

from foveate.core.errors import FoveateError, unknown

_STEPS = (
    "a next-scale model runs every scale once, and the size fixes the scales: leave it out; policy= or budget= makes "
    "a call cheaper"
)
_EMBEDS = "prompts are texts here: give prompt="

CALL: Mapping[str, str] = {
    "num_inference_steps": _STEPS,
    "timesteps": _STEPS,
    "sigmas": _STEPS,
    "eta": "there is no noise schedule: leave it out",
    "guidance_rescale": "guidance is not rescaled: leave it out",
    "true_cfg_scale": "use guidance_scale, a number or one per scale",
    "latents": "a run starts from no noise: use seed",
    "prompt_embeds": _EMBEDS,
    "negative_prompt_embeds": "prompts are texts here: give negative_prompt=",
    "prompt_2": "there is one prompt: leave it out",
    "negative_prompt_2": "there is one prompt: leave it out",
    "max_sequence_length": "the text encoder's own length holds, and a prompt that is cut is a warning: leave it out",
    "clip_skip": "the model reads its published layer: leave it out",
    "image": "images are made from text alone: leave it out",
    "strength": "images are made from text alone: leave it out",
    "return_dict": "a call returns an object with .images: leave it out",
    "callback": "use callback_on_step_end, which is called after every scale",
    "callback_steps": "use callback_on_step_end, which is called after every scale",
    "callback_on_step_end_tensor_inputs": 'a callback gets {"latents": tensor}: leave it out',
    "cross_attention_kwargs": "there are no LoRA weights to scale: leave it out",
    "joint_attention_kwargs": "there are no LoRA weights to scale: leave it out",
}
"""Of a call."""

LOADING: Mapping[str, str] = {
    "variant": "dtype= decides what the model computes in, whatever its files hold: leave it out",
    "use_safetensors": "weights are found by name, safetensors first: leave it out",
    "device_map": 'use device="cuda", or offload=True with it',
    "low_cpu_mem_usage": "weights are read straight into place: leave it out",
    "cache_dir": "set the environment variable HF_HOME",
    "token": "set the environment variable HF_TOKEN",
    "safety_checker": "there is none: leave it out",
    "scheduler": "there is none, as the size fixes the scales: leave it out",
    "vae": "use autoencoder=, a file of weights",
    "transformer": "name_or_path= is the transformer's file or folder: leave it out",
    "custom_pipeline": "no code is loaded from the hub: leave it out",
    "trust_remote_code": "no code is loaded from the hub: leave it out",
    "subfolder": "name_or_path= may be a folder: give the whole path",
}
"""Of `from_pretrained`."""


class NoOthers(TypedDict):
    """Keyword arguments of a function that takes no others: type checkers refuse every one, and it says why."""


def unknown_option(name: str, known: Iterable[str]) -> FoveateError:
    """The error for an option of a call that there is not."""
    if name in CALL:
        return FoveateError(f"{name} is an option of diffusers; {CALL[name]}")
    return unknown("option", name, list(known))


def refuse_loading(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuses arguments of `from_pretrained` that there are not.

    Raises:
        FoveateError: There is a name; the first one is named.
    """
    for name in names:
        if name in LOADING:
            raise FoveateError(f"{name} is an option of diffusers; {LOADING[name]}")
        raise unknown("option of from_pretrained", name, list(known))
