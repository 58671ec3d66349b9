"""What a sublayer adds to the hidden states: its change, times a gate per row where it has one.

Axes: n packed tokens, R rows, C width.
"""

from jaxtyping import Float
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels import native
from foveate.kernels.gpu import launch


def gated(change_nC: Float[Tensor, "n C"], gate_RC: Float[Tensor, "R C"] | None, rows: Rows) -> Float[Tensor, "n C"]:
    """The change in float32, times the gate of each token's row; no gate means 1."""
    return change_nC.float() if gate_RC is None else change_nC.float() * rows.spread(gate_RC)


def add_gated_(
    x_nC: Float[Tensor, "n C"], change_nC: Float[Tensor, "n C"], gate_RC: Float[Tensor, "R C"] | None, rows: Rows
) -> None:
    """Adds `gated(change_nC, gate_RC, rows)` to `x_nC`, in place and bit for bit as plain torch adds it.

    Args:
        x_nC: Hidden states, float32; changed.
        change_nC: What the sublayer computed, in any dtype; left as it was.
        gate_RC: Float32; one entry per row.
        rows: Which tokens belong to which row.
    """
    if launch.serves(x_nC, change_nC):
        launch.run("residual", _triton_, _plain_, x_nC, change_nC, gate_RC, rows)
        return
    is_whole = x_nC.is_contiguous() and change_nC.is_contiguous() and (gate_RC is None or gate_RC.stride(-1) == 1)
    if not is_whole or not native.serves(x_nC, change_nC):
        _plain_(x_nC, change_nC, gate_RC, rows)
        return
    library = native.loaded()
    library.foveate_residual(
        x_nC.data_ptr(),
        change_nC.data_ptr(),
        native.dtype_code(change_nC),
        0 if gate_RC is None else gate_RC.data_ptr(),
        0 if gate_RC is None else gate_RC.stride(0),
        native.integers(*rows.starts),
        *x_nC.shape,
        native.num_threads(x_nC.numel()),
    )


def _plain_(
    x_nC: Float[Tensor, "n C"], change_nC: Float[Tensor, "n C"], gate_RC: Float[Tensor, "R C"] | None, rows: Rows
) -> Float[Tensor, "n C"]:
    x_nC += gated(change_nC, gate_RC, rows)
    return x_nC


def _triton_(
    x_nC: Float[Tensor, "n C"], change_nC: Float[Tensor, "n C"], gate_RC: Float[Tensor, "R C"] | None, rows: Rows
) -> Float[Tensor, "n C"]:
    launch.kernel("residual").add_gated_(x_nC, change_nC, gate_RC, rows)
    return x_nC
