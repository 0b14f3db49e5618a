"""After GPTQ: codes that the error of all others asks for, and scales of least squares for them.

Both lower tr(D H D'), D the error and H the mean of x x', and neither can raise it but by the rounding of scales to float16.
"""

from dataclasses import replace

import torch
from torch import Tensor

from swift.model.quantized.base import GroupedWeight

# N outputs, K inputs, G groups of S inputs, C columns of a part

COLUMNS = 64
ROUNDS = {2: 3, 3: 3}  # more of them gain little with 4 bits, and much with fewer
RIDGE = 1e-4  # of the diagonal: how strongly a scale that hardly matters stays what it was
MOST = 2.0  # a scale becomes at most so many times what it was, or so many times less
LARGEST = 2**25  # numbers of the normal equations (N, G, G) that are in memory at once


def refine(weight: Tensor, hessian: Tensor, found: GroupedWeight) -> GroupedWeight:
    """``found`` for ``weight`` (N, K), better for the inputs of ``hessian`` (K, K)."""
    order = None if found.groups is None else found.group_of_inputs().argsort(stable=True)
    codes = found.codes
    if order is not None:
        hessian, weight, codes = hessian[order][:, order].contiguous(), weight[:, order], codes[:, order]
    wanted = weight @ hessian
    whole = codes.float() - found.zeros.float().repeat_interleave(weight.shape[1] // found.scales.shape[1], 1)
    scales = found.scales
    for _ in range(ROUNDS.get(found.bits, 1)):
        whole = descend(wanted, hessian, whole, scales, found)
        scales = fit_scales(wanted, hessian, whole, scales)
    zeros = found.zeros.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    codes = (whole + zeros).to(torch.uint8)
    return replace(found, codes=(codes if order is None else codes[:, order.argsort()]).contiguous(), scales=scales)


def fit_scales(wanted: Tensor, hessian: Tensor, whole: Tensor, scales: Tensor) -> Tensor:
    """Scales (N, G) of least squares for the whole numbers ``whole`` (N, K), in values that float16 holds; ``wanted`` is W H."""
    rows = max(1, LARGEST // scales.shape[1] ** 2)
    parts = zip(wanted.split(rows), whole.split(rows), scales.split(rows), strict=True)
    return torch.cat([_fit_rows(*part, hessian) for part in parts])


def _fit_rows(wanted: Tensor, whole: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    count = scales.shape[1]
    size = whole.shape[1] // count
    grouped_NGS = whole.unflatten(1, (count, size))
    wanted_NG = torch.linalg.vecdot(wanted.unflatten(1, (count, size)), grouped_NGS)
    normal_NGG = torch.empty(len(whole), count, count, device=whole.device)
    for group in range(count):
        seen = grouped_NGS[:, group] @ hessian[group * size : (group + 1) * size]
        normal_NGG[:, group] = torch.linalg.vecdot(seen.unflatten(1, (count, size)), grouped_NGS)
    diagonal = normal_NGG.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal + 1e-12
    wanted_NG += ridge * scales
    diagonal += ridge
    fitted, fault = torch.linalg.solve_ex(normal_NGG, wanted_NG)
    is_near = (fitted > scales / MOST) & (fitted < scales * MOST) & (fault == 0)[:, None]
    return torch.where(is_near, fitted, scales).half().float()


def descend(wanted: Tensor, hessian: Tensor, whole: Tensor, scales: Tensor, found: GroupedWeight) -> Tensor:
    """Whole numbers (N, K): column after column the best for what all other columns are, once; ``wanted`` is W H."""
    inputs = whole.shape[1]
    size = inputs // scales.shape[1]
    scales_KN = scales.repeat_interleave(size, 1).T.contiguous()
    zeros_KN = found.zeros.float().repeat_interleave(size, 1).T.contiguous()
    whole_KN = whole.T.contiguous()
    most = 2**found.bits - 1
    # H (W - Q)': what a column gains from moving, before its own curvature.
    pull_KN = torch.addmm(wanted.T, hessian, whole_KN * scales_KN, alpha=-1)
    curvature = hessian.diagonal().clamp(min=1e-20).tolist()
    columns = list(zip(pull_KN.unbind(), scales_KN.unbind(), zeros_KN.unbind(), whole_KN.unbind(), curvature, strict=True))
    for begin in range(0, inputs, COLUMNS):
        end = min(inputs, begin + COLUMNS)
        moved_CN = torch.zeros_like(pull_KN[begin:end])
        within = hessian[begin:end, begin:end]
        for place, into in zip(range(begin, end), moved_CN.unbind(), strict=True):
            pull, scale, zero, now, curved = columns[place]
            best = torch.div(pull, scale).div_(curved).add_(now).round_().add_(zero).clamp_(0, most).sub_(zero)
            step = torch.sub(best, now, out=into).mul_(scale)
            now.copy_(best)
            if place + 1 < end:
                pull_KN[place + 1 : end].addr_(within[place - begin, place + 1 - begin :], step, alpha=-1)
        # Columns before this part are done with.
        if end < inputs:
            pull_KN[end:].addmm_(hessian[end:, begin:end], moved_CN, alpha=-1)
    return whole_KN.T
