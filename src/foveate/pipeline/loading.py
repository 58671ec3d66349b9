"""How a process loads a model, as plain data that another process can do, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from foveate.pipeline.pipeline import Pipeline

MAX_THREADS = 4096
"""More than any machine has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How a process loads the model.

    Attributes:
        model: As `Pipeline.from_pretrained` takes it.
        options: Its keyword arguments.
        threads: CPU threads; None leaves them as they are.
        cuda_graphs: Whether `Pipeline.enable_cuda_graphs` is called.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    cuda_graphs: bool = False

    def open(self) -> Pipeline:
        """Loads it; sets the number of threads of this process.

        Raises:
            FoveateError: As `Pipeline.from_pretrained`.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        pipe = Pipeline.from_pretrained(self.model, **self.options)
        if self.cuda_graphs:
            pipe.enable_cuda_graphs()
        return pipe

    def with_threads(self) -> "Loading":
        """The same with the number of CPU threads of this process, which decides last bits, where none is asked for."""
        return self if self.threads is not None else replace(self, threads=torch.get_num_threads())

    def on_cpu(self) -> "Loading":
        """The same weights in main memory, for a process that has no GPU and only has to know them."""
        return replace(
            self, options={**self.options, "device": "cpu", "offload": False, "kernels": None}, cuda_graphs=False
        )
