"""Speed on a CPU: a layout of weights and a setting of the allocator. Neither changes a result beyond rounding."""

import ctypes
import sys

import torch
from torch import nn


class InferenceLinear(nn.Module):
    """A linear layer for CPU inference, without gradients: oneDNN's matrix product and weight layout, at the speed of memory.
    `compiled` computes a single row, without bias, as fast as a sum, and keeps the weights in both layouts."""

    def __init__(self, linear, compiled):
        super().__init__()
        self.weight, self.stream, self.bias = None, None, None if linear.bias is None else linear.bias.detach()
        if compiled and linear.bias is None:
            self.weight, self.stream = linear.weight.detach(), torch.compile(lambda weight, row: (weight * row).sum(-1))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, x):
        if self.stream is not None and x.shape[:-1].numel() == 1:
            return self.stream(self.weight, x.flatten()).view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], None)


def pack_linears(model, compiled=False):
    """Replace a model's linear layers, if that helps: on a CPU only, and irreversibly."""
    like = next(model.parameters())
    if like.device.type != "cpu" or like.dtype == torch.float16 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    try:
        torch.ops.mkldnn._reorder_linear_weight(like.new_zeros(8, 8), 8)
    except RuntimeError:  # bfloat16 on a CPU without instructions for it
        return
    # a subclass may compute more, as a LoRA of one's own
    for name, linear in [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]:
        model.set_submodule(name, InferenceLinear(linear, compiled))


def keep_freed_memory():
    """Tell glibc to keep freed memory: returning pages and faulting them in again takes most of a training step on a CPU.
    Not beside a GPU, where it would keep whole checkpoints."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        # M_TRIM_THRESHOLD: never shrink the heap; M_TOP_PAD: grow it in large steps; M_MMAP_MAX: no mappings for large blocks
        for setting, value in ((-1, 2**31 - 1), (-2, 2**28), (-4, 0)):
            ctypes.CDLL(None).mallopt(setting, value)
