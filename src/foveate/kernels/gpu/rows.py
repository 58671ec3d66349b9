"""How a kernel finds the row of a token: by a division where all rows are equally long, else from a list."""

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.rows import Rows


def lookup(rows: Rows, device: torch.device) -> tuple[Int[Tensor, " n"] | None, int]:
    """The row of every token, or None, and the tokens of a row if it is None.

    The list is built once per `Rows` and device.
    """
    if rows.uniform is not None:
        return None, max(rows.uniform, 1)
    return rows.row_of_token(device), 1
