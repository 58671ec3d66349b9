"""How to make an image again: as a command, and as a request. Neither ever holds a key."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.pipeline.encoding import Encoder
from foveate.pipeline.options import OPTIONS
from foveate.server.admission import Asked

_OPTIONS = ("negative_prompt", "guidance_scale", "temperature", "top_k", "top_p")
_AS_ASKED = ("prompt", *_OPTIONS, "more_smooth", "output_format", "output_compression")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where requests go, whether they need a key, and the flags that load the model."""

    base_url: str
    has_keys: bool
    model_flags: tuple[str, ...]


def command_of(asked: Asked, seed: int, policy: str, origin: Origin) -> str:
    """The command that makes one image again.

    Args:
        asked: What was asked.
        seed: Of this image.
        policy: Its spec, as it ran.
        origin: Of the server.
    """
    body, job = asked.body, asked.job
    words = [*_flag("seed", seed), "--size", asked.size]
    words += _flag("policy", policy) if policy != "full" else []
    for name in _OPTIONS:
        value = getattr(body, name)
        words += [] if value is None else _flag(name, value)
    if body.more_smooth is not None:
        words.append("--more-smooth" if body.more_smooth else "--no-more-smooth")
    words += [*_of_encoder(asked.encoder), *origin.model_flags]
    prompt = job.prompts[0]
    # A prompt that begins like a flag goes behind all of them.
    words = [*words, "--", prompt] if prompt.startswith("-") else [prompt, *words]
    return shlex.join(["foveate", "generate", *words])


def curl_of(asked: Asked, seed: int, policy: str, origin: Origin) -> str:
    """The request that makes one image again; a key comes from the environment of whoever runs it."""
    given = asked.body.model_dump(include=set(_AS_ASKED), exclude_none=True)
    content: dict[str, Any] = {**given, "size": asked.size, "seed": seed, "policy": policy}
    words = ["curl", f"{origin.base_url.rstrip('/')}/v1/images/generations", "-H", "Content-Type: application/json"]
    key = ' -H "Authorization: Bearer $FOVEATE_API_KEY"' if origin.has_keys else ""
    return f"{shlex.join(words)}{key} -d {shlex.quote(json.dumps(content, ensure_ascii=False))}"


def _flag(name: str, value: Any) -> list[str]:  # noqa: ANN401 - of whatever type the option is
    """A flag and its value; one that begins like a flag is tied to it."""
    option = OPTIONS[name]
    flag = next(iter(option.flags), f"--{name.replace('_', '-')}")
    text = ",".join(map(_text, value)) if isinstance(value, Sequence) and not isinstance(value, str) else _text(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _of_encoder(encoder: Encoder) -> list[str]:
    if encoder.format == "png":
        return []
    ending = "jpg" if encoder.format == "jpeg" else encoder.format
    return ["--format", ending, "--quality", str(encoder.quality)]
