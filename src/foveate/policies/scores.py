"""Pure functions that several policies share."""


def bit_reversal_order(num_blocks: int) -> tuple[int, ...]:
    """Blocks in bit-reversal order: reversed over ceil(log2 P) bits, indices beyond the last block left out."""
    bits = max(num_blocks - 1, 0).bit_length()
    reversed_indices = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return tuple(i for i in reversed_indices if i < num_blocks)
