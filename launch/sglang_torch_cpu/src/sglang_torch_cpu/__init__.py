"""SGLang on plain PyTorch without a GPU, through SGLang's own plugin mechanism: no file of SGLang is changed.

`SGLANG_PLATFORM=torch_cpu` selects it. Made for sglang 0.5.23: `platform.py` and `seeds.py` name every upstream object
that is replaced. For tests and small runs; on a GPU SGLang is used as it is.
"""

import torch

_VISION_OPERATORS = ("nms", "qnms")
_library: torch.library.Library | None = None


def activate() -> str:
    """Called by SGLang to find the platform; returns the path of its class.

    SGLang imports torchvision. Built for CUDA, as on the package index, its C extension does not load beside a CPU
    torch, and its Python files then fail on the operators they describe: they are declared here, without a body.
    """
    global _library
    if torch.version.cuda is None and _library is None:
        _library = torch.library.Library("torchvision", "DEF")
        for name in _VISION_OPERATORS:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return "sglang_torch_cpu.platform.TorchCpuPlatform"
