"""The Triton backend: every pattern and every term on a GPU, forward and backward.

Files, in reading order: `structs` (what kernels are given), `geometry` (csrc/pattern.h again, as Triton functions),
`engine` (pieces of channels, products, scores), `forward`, `backward` and `weights` (the kernels), `tiles` (which tile
for which problem and architecture), `launch` (from tensors to launches), `operators` (registration).

Nothing here is imported unless Triton is installed.
"""
