"""Every kernel by its name."""

from __future__ import annotations

from visattn_kernels.triton.backward import (
    attention_backward_dkdv_kernel,
    attention_backward_dq_kernel,
    attention_delta_kernel,
)
from visattn_kernels.triton.forward import attention_forward_kernel
from visattn_kernels.triton.weights import attention_map_kernel

KERNELS = {
    "attention_forward_kernel": attention_forward_kernel,
    "attention_delta_kernel": attention_delta_kernel,
    "attention_backward_dq_kernel": attention_backward_dq_kernel,
    "attention_backward_dkdv_kernel": attention_backward_dkdv_kernel,
    "attention_map_kernel": attention_map_kernel,
}
