"""`foveate serve`: images over HTTP, behind OpenAI's images API."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from foveate.cli.console import note, warn
from foveate.cli.options import LIMITS, SERVER, ConfigFlag, ModelOptions
from foveate.core.errors import FoveateError

if TYPE_CHECKING:
    from foveate.server.settings import ServerSettings

_MEBIBYTE = 1 << 20


@Parameter(name="*", group=SERVER)
@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """How the server runs.

    Attributes:
        host: Address to listen on; 0.0.0.0 for all.
        port: 0 takes a free one.
        api_keys: A file with one API key a line, read again when it changes; FOVEATE_API_KEYS adds keys, with commas.
        served_model_name: Another name that requests may call the model by; give it again for several.
        allowed_host: A name that requests may call the server by, beside those of loopback; give it again for several.
            Default: any, but on loopback without API keys those of loopback.
        cors_origin: A web page's origin that browsers let in, such as https://example.org; give it again for several.
        moderation: A function package.module:function(prompt, image) that refuses prompts and images.
        moderation_seconds: That one call of it may take; then its request is refused.
        keep_on_disconnect: Finish the images of a client that went away, and keep them under its x-request-id.
        grace: Seconds between SIGTERM and the end of the process.
        log_prompts: Write prompts into the log.
        log_level: What is logged, as JSON lines on stderr.
        encoders: Threads that encode images.
        config: A YAML file with values for these flags; flags win.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    served_model_name: list[str] | None = None
    allowed_host: list[str] | None = None
    cors_origin: list[str] | None = None
    moderation: str | None = None
    moderation_seconds: float = 30.0
    keep_on_disconnect: bool = False
    grace: float = 30.0
    log_prompts: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    encoders: int = 2
    config: ConfigFlag = None


@Parameter(name="*", group=LIMITS)
@dataclass(frozen=True, kw_only=True, slots=True)
class LimitOptions:
    """How much is taken on.

    Attributes:
        max_batch_size: Images in progress at once, those of all requests.
        max_queue: Images that may wait; beyond that 429.
        memory_share: Of the memory that is free at the start, what images may take, up to 1.
        max_images: n of a request at most.
        max_pixels: Of one image, width times height; default: any possible size.
        max_prompt_chars: Of a prompt, and of a negative prompt.
        max_body: Bytes of a request's body.
        rate_limit: Requests a minute of one key; default: no limit.
        store: A folder for images behind urls; default: the system's for temporary files.
        store_images: That are kept at most.
        store_mib: MiB that are kept at most.
        store_seconds: How long an image is kept.
    """

    max_batch_size: int = 8
    max_queue: int = 64
    memory_share: float = 0.8
    max_images: int = 10
    max_pixels: int | None = None
    max_prompt_chars: int = 4000
    max_body: int = _MEBIBYTE
    rate_limit: float | None = None
    store: Path | None = None
    store_images: int = 1000
    store_mib: int = 1024
    store_seconds: float = 3600.0


@Parameter(name="*", group=SERVER)
@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Where the model runs.

    Attributes:
        engine: local: in the process of the server. ray: in replicas on Ray Serve; needs the extra ray.
        address: Of a Ray cluster, such as auto or ray-head:6379; default: one of this machine for this server.
        num_replicas: Replicas; default: 1.
        min_replicas: Replicas that always run, where their number follows the load.
        max_replicas: Replicas that run at most, where their number follows the load.
        target_ongoing: Requests of a replica, on average, that the number of replicas is steered to; default:
            --max-batch-size.
        cpus_per_replica: CPUs of a replica, which are its threads; default: its share of this machine's.
        gpus_per_replica: GPUs of a replica; 0.5 puts two on one.
    """

    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    num_replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_ongoing: float | None = None
    cpus_per_replica: float | None = None
    gpus_per_replica: float | None = None

    @property
    def fewest(self) -> int:
        """Replicas that always run."""
        fixed = 1 if self.num_replicas is None else self.num_replicas
        return fixed if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Replicas that run at most."""
        fixed = 1 if self.num_replicas is None else self.num_replicas
        return fixed if self.max_replicas is None else self.max_replicas


_MODEL, _SERVE, _LIMITS, _ENGINE = ModelOptions(), ServeOptions(), LimitOptions(), EngineOptions()


def serve(
    *,
    options: ServeOptions = _SERVE,
    engine: EngineOptions = _ENGINE,
    limits: LimitOptions = _LIMITS,
    model: ModelOptions = _MODEL,
) -> int:
    """Serve images over HTTP, behind OpenAI's images API.

    Args:
        options: How the server runs.
        engine: Where the model runs.
        limits: How much is taken on.
        model: Which model runs, and on what.
    """
    try:
        import fastapi  # noqa: F401, PLC0415 - an extra, and slow to import
        import sse_starlette  # noqa: F401, PLC0415
        import uvicorn  # noqa: F401, PLC0415
    except ImportError as error:
        raise FoveateError(f'foveate serve needs the extra serve: pip install "foveate[serve]" ({error})') from None

    import logging  # noqa: PLC0415

    from foveate.cli.loading import open_pipeline, spec_of  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.pipeline.pipeline import Pipeline  # noqa: PLC0415
    from foveate.server.hosts import LOOPBACK  # noqa: PLC0415
    from foveate.server.logs import json_logs  # noqa: PLC0415
    from foveate.server.scheduler import Scheduler, SchedulerSettings  # noqa: PLC0415
    from foveate.server.serving import Place, Served, serve_locally, serve_until_signal  # noqa: PLC0415

    level = logging.getLevelNamesMapping()[options.log_level.upper()]
    _check_engine(engine, model)
    place = Place(host=options.host, port=options.port, grace_s=options.grace)
    share = limits.memory_share * _share_of_machine(engine)
    packing = SchedulerSettings(max_images=limits.max_batch_size, max_queue=limits.max_queue, memory_share=share)
    settings = _settings(options, limits, model)
    spec_of(model)
    if options.host not in LOOPBACK and not settings.keys.is_required:
        warn(f"everybody who reaches {options.host} can use this server; --api-keys lets in who has a key")

    def load() -> tuple[Pipeline, Scheduler]:
        pipe = open_pipeline(model, is_quiet=True)
        return pipe, Scheduler(pipe, packing)

    def replicas() -> Served:
        from foveate.server.replicas.serving import RayServed, ReplicaSettings  # noqa: PLC0415 - ray, an extra

        wanted = ReplicaSettings(
            address=engine.address,
            least=engine.fewest,
            most=engine.most,
            target_ongoing=float(limits.max_batch_size) if engine.target_ongoing is None else engine.target_ongoing,
            cpus=engine.cpus_per_replica,
            gpus=engine.gpus_per_replica or 0.0,
            grace_s=options.grace,
            log_level=level,
        )
        return RayServed(load, settings, wanted)

    with json_logs(level):
        is_here = engine.engine == "local"
        is_done = serve_locally(load, settings, place) if is_here else serve_until_signal(replicas, place)
    if not is_done:
        note(f"not everything was finished within {options.grace:g} s; the rest was answered with an error")
    return 0


def _share_of_machine(engine: EngineOptions) -> float:
    """Of the memory that is free, what one process may count on, where its neighbours are known."""
    if engine.gpus_per_replica:
        return min(1.0, engine.gpus_per_replica)
    return 1.0 if engine.engine == "local" or engine.address is not None else 1 / max(1, engine.most)


def _check_engine(engine: EngineOptions, model: ModelOptions) -> None:
    """Refuses flags that contradict each other, or need another engine.

    Raises:
        FoveateError: It names the flag.
    """
    from foveate.core.cluster import ray_module  # noqa: PLC0415

    given = [name for name in EngineOptions.__slots__ if getattr(engine, name) != getattr(_ENGINE, name)]
    if engine.engine == "local":
        if given:
            raise FoveateError(f"--{given[0].replace('_', '-')} needs --engine ray; add it, or leave the flag out")
        return
    if engine.num_replicas is not None and {"min_replicas", "max_replicas"} & set(given):
        raise FoveateError("give --num-replicas, or --min-replicas and --max-replicas, not both")
    if (engine.max_replicas is None) != (engine.min_replicas is None):
        raise FoveateError("--min-replicas and --max-replicas come together; give both")
    if engine.gpus_per_replica and model.device in (None, "cpu"):
        raise FoveateError("--gpus-per-replica needs a model on a GPU; add --device cuda, or leave the flag out")
    ray_module()


def _settings(options: ServeOptions, limits: LimitOptions, model: ModelOptions) -> "ServerSettings":
    """The flags as the server takes them.

    Raises:
        FoveateError: A key file cannot be read, a limit would let nothing in, or there is no such function.
    """
    from foveate.families.loading import model_names  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.server.keys import ENVIRONMENT, Keys  # noqa: PLC0415
    from foveate.server.limits import Limits  # noqa: PLC0415
    from foveate.server.moderation import load_check  # noqa: PLC0415
    from foveate.server.settings import ServerSettings  # noqa: PLC0415
    from foveate.server.store import StoreSettings  # noqa: PLC0415

    keys = Keys(options.api_keys, os.environ.get(ENVIRONMENT, ""))
    own_name = (model.model,) if model.model in model_names() else ()
    return ServerSettings(
        keys=keys,
        limits=Limits(
            body_bytes=limits.max_body,
            prompt_chars=limits.max_prompt_chars,
            images=limits.max_images,
            pixels=limits.max_pixels,
            requests_per_minute=limits.rate_limit,
        ),
        store=StoreSettings(
            folder=limits.store,
            images=limits.store_images,
            bytes=limits.store_mib * _MEBIBYTE,
            seconds=limits.store_seconds,
        ),
        moderation=None if options.moderation is None else load_check(options.moderation),
        moderation_seconds=options.moderation_seconds,
        hosts=_hosts(options, has_keys=keys.is_required),
        origins=tuple(options.cors_origin or ()),
        aliases=(*own_name, *(options.served_model_name or ())),
        model_flags=_flags_of(model),
        keeps_on_disconnect=options.keep_on_disconnect,
        encoders=options.encoders,
        shows_prompts=options.log_prompts,
    )


def _hosts(options: ServeOptions, *, has_keys: bool) -> tuple[str, ...] | None:
    """Names that requests may call the server by; None for any."""
    from foveate.server.hosts import LOOPBACK  # noqa: PLC0415 - of an extra

    if options.allowed_host is None and (has_keys or options.host not in LOOPBACK):
        return None
    return (*LOOPBACK, options.host, *(options.allowed_host or ()))


def _flags_of(model: ModelOptions) -> tuple[str, ...]:
    """What `foveate generate` needs to load the same model; a folder by its name only, as clients read it."""
    words = ["--model", Path(model.model).name if Path(model.model).exists() else model.model]
    for name in ("weights", "revision", "dtype", "decoder_dtype", "quantization", "device"):
        value = getattr(model, name)
        if value != getattr(_MODEL, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(words)
