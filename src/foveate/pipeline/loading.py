"""How a process loads a model, as plain data that another process can do, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.pipeline.pipeline import Pipeline


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
