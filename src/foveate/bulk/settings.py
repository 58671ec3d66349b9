"""What decides the images of a run, as plain data that travels to other processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from foveate.core.errors import FoveateError
from foveate.core.version import __version__
from foveate.pipeline.encoding import Encoder
from foveate.pipeline.loading import Loading
from foveate.pipeline.options import Options
from foveate.pipeline.output import describe_precision, place_names
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy

ShardFormat = Literal["tar", "parquet"]
"""`tar` is WebDataset's."""

NOT_OF_A_RUN = ("seed", "num_images_per_prompt", "negative_prompt")
"""Options that rows have each for itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """A run of `foveate batch`.

    Attributes:
        loading: Of the model.
        options: Of all images, where rows say nothing else; the seed is the base seed of rows that have none.
        encoder: Of the files of images.
        shard_format: How shards are stored.
        shard_size: Rows of a shard.
        batch_size: Images generated at once; None takes what fits into memory, 16 at most.
        retries: How often an image that failed is tried again, alone.
        psnr_to_full: Whether every image is also generated in full, and compared.
    """

    loading: Loading
    options: Options
    encoder: Encoder = field(default_factory=Encoder)
    shard_format: ShardFormat = "tar"
    shard_size: int = 1000
    batch_size: int | None = None
    retries: int = 1
    psnr_to_full: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        for name, least in (("shard_size", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise FoveateError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise FoveateError(f"batch_size must be 1 or more, got {self.batch_size}")

    @property
    def seed(self) -> int:
        """The base seed."""
        seed = self.options.get("seed")
        return 0 if seed is None else int(seed)  # type: ignore[arg-type]  # one seed, the command line saw to it

    @property
    def images_per_row(self) -> int:
        """Images of a row that does not say."""
        return int(self.options.get("num_images_per_prompt") or 1)

    def config(self, model: Mapping[str, Any], **of_input: Any) -> dict[str, Any]:
        """What `run.json` holds: everything that decides which images there are and what their files hold.

        Args:
            model: `described` of the pipeline.
            **of_input: What is read.
        """
        given = {name: value for name, value in self.options.items() if value is not None and name != "seed"}
        policy = load_policy(self.options.get("policy", "full"))
        return {
            "foveate": __version__,
            **of_input,
            "options": {**given, "policy": {"spec": policy.spec, "fingerprint": policy.fingerprint}},
            "seed": self.seed,
            "model": dict(model),
            "output": {"container": self.shard_format, "shard_size": self.shard_size, **self.encoder.to_json()},
            "psnr_to_full": self.psnr_to_full,
        }


def described(pipe: Pipeline, loading: Loading) -> dict[str, Any]:
    """The model of a run, as far as images depend on it; on a CPU the number of threads decides last bits.

    Args:
        pipe: The model, wherever it is.
        loading: How workers load it.
    """
    model, device = pipe.model, str(loading.options.get("device", "cpu")).partition(":")[0]
    return {
        "name": model.spec.name,
        "weights": model.weights,
        "sha256": model.sha256,
        **describe_precision(model.precision),
        "device": device,
        "text_encoders": list(place_names(model.text_encoders)),
        **({"threads": loading.threads} if device == "cpu" else {"kernels": loading.options.get("kernels")}),
    }
