"""The kernels that are in use on this machine, and the reasons why others are not."""

import torch

from dmquant.kernels import attention, onednn, registry, self_check, triton_support
from dmquant.kernels.registry import EXACT, KERNELS, choice


def kernel_status() -> dict[str, str]:
    """Returns, for each kernel by name, "" if it is in use, otherwise the reason why not. Compiles kernels at the first call."""
    wanted = choice()
    found: dict[str, str] = {}
    superseded: dict[str, str] = {}  # name of a kernel -> name of the one that supersedes it
    for kernel in KERNELS:
        if wanted not in ("auto", "c"):
            found[kernel.name] = f"DMQUANT_KERNELS={wanted}"
        elif kernel.name in superseded:
            found[kernel.name] = f"not needed beside {superseded[kernel.name]}"
        elif kernel.is_portable and wanted == "auto":
            found[kernel.name] = "plain C, only with DMQUANT_KERNELS=c"
        else:
            found[kernel.name] = registry.find_missing(kernel) or self_check.check(kernel.name, self_check.CodeFormat(1, 1, 4))
        if not found[kernel.name]:
            superseded |= dict.fromkeys(set(kernel.supersedes) - set(superseded), kernel.name)
    unwanted = f"DMQUANT_KERNELS={wanted}"
    found[onednn.NAME] = onednn.find_missing() if wanted in ("auto", "onednn") else unwanted
    found[triton_support.NAME] = triton_status() if wanted in ("auto", triton_support.NAME) else unwanted
    slow = f"integers by torch, only with DMQUANT_KERNELS={EXACT.name}"
    found[EXACT.name] = {EXACT.name: "", "auto": slow}.get(wanted, unwanted)
    found[attention.NAME] = attention.find_missing()
    return found


def triton_status() -> str:
    """Returns "" if Triton's kernels are in use on the current GPU, otherwise the reason why not."""
    reason = triton_support.find_missing()
    if reason:
        return reason
    device = torch.device("cuda", torch.cuda.current_device())
    return self_check.check(triton_support.NAME, self_check.CodeFormat(1, 1, 4), device)
