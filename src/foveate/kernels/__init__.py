"""The few operations that are worth code of their own: attention, linear layers, norm, gated residual, heads, GELU.

Each is a function with plain torch as its twin. Which code runs follows from the tensors alone: C on a CPU that has the
instructions (`native`), plain torch elsewhere and wherever gradients are wanted.
"""
