"""The operators of `mmcv._ext` in plain PyTorch and torchvision, under mmcv's names and argument lists.

mmcv's own autograd functions call these with buffers that they own; most write their results into them in place. All
run on every device that torchvision runs on. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, by falling score.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Boxes that overlap a better one by more are dropped.
        offset: 1 counts a box's last row and column of pixels, 0 does not.
    """
    boxes, scores = _widened(boxes), _widened(scores)
    if offset:
        boxes = boxes + boxes.new_tensor((0, 0, offset, offset))
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft suppression: a box overlapping a better one keeps a part of its score.

    Source: Bodla et al. 2017 (arXiv 1704.04503). Among equal scores the choice is mmcv's.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5), receives the kept boxes with their final scores.
        iou_threshold: Overlaps from this on count, but for method 2.
        sigma: Width of method 2.
        min_score: Boxes whose score falls below are dropped.
        method: 0 drops (hard suppression), 1 multiplies by 1 - IoU, 2 by exp(-IoU ** 2 / sigma).
        offset: As in `nms`.

    Returns:
        Indices of the kept boxes, best first.
    """
    overlaps = _pairwise_iou(boxes, offset)
    scores = scores.clone()
    places = torch.arange(len(boxes), device=boxes.device)  # those in front of `turn` are kept
    turn = 0
    while turn < len(places):
        rest = scores[places[turn:]]
        best = turn + int((rest == rest.max()).nonzero()[0])
        places[[turn, best]] = places[[best, turn]]
        chosen, others = places[turn], places[turn + 1 :]
        dets[turn, :4], dets[turn, 4] = boxes[chosen], scores[chosen]
        scores[others] *= _soft_weights(overlaps[chosen, others], iou_threshold, sigma, method)
        turn += 1
        places = torch.cat((places[:turn], _drop(others, scores[others] < min_score)))
    return places


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` (K, C, h, w) with the mean of bilinear samples of `input` (B, C, H, W) in each bin of `rois`.

    Args:
        input: (B, C, H, W).
        rois: (K, 5): image, x1, y1, x2, y2.
        output: (K, C, aligned_height, aligned_width).
        argmax_y: Unused.
        argmax_x: Unused.
        aligned_height: Bins of a region from top to bottom.
        aligned_width: Bins of a region from left to right.
        spatial_scale: From the coordinates of `rois` to those of `input`.
        sampling_ratio: Samples of a bin along each axis; 0 for one a pixel.
        pool_mode: 1, the mean.
        aligned: Pixel centres lie at half-integers.

    Raises:
        NotImplementedError: `pool_mode` is 0, the maximum.
    """
    _check_mean(pool_mode)
    arguments = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    values = _widened(input)
    output.copy_(torch.ops.torchvision.roi_align(values, rois.to(values.dtype), *arguments))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input`, the gradient of `roi_align_forward`; see there for the arguments and errors."""
    _check_mean(pool_mode)
    grad = _widened(grad_output)
    shape = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, rois.to(grad.dtype), *shape))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills `output` (K, C, h, w) with the maximum of `input` (B, C, H, W) in each bin of `rois` (K, 5)."""
    values = _widened(input)
    pooled, places = torch.ops.torchvision.roi_pool(
        values, rois.to(values.dtype), spatial_scale, pooled_height, pooled_width
    )
    output.copy_(pooled)
    argmax.copy_(places)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills `grad_input`, the gradient of `roi_pool_forward`."""
    grad = _widened(grad_output)
    shape = (spatial_scale, pooled_height, pooled_width, *grad_input.shape)
    grad_input.copy_(torch.ops.torchvision._roi_pool_backward(grad, rois.to(grad.dtype), argmax, *shape))


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: Any
) -> None:
    """Fills `output` with a convolution whose taps are moved by `offset` (2 channels, y and x, for each tap)."""
    mask, bias = _no_mask(input), input.new_zeros(weight.shape[0])
    output.copy_(_deform_conv2d(input, weight, offset, mask, bias, _plain_geometry(geometry), False))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Fills the gradients of `deform_conv_forward` for its input and offsets."""
    gradients = _plain_gradients(grad_output, input, weight, offset, geometry)
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1.0,
    **geometry: Any,
) -> None:
    """Adds the weight's gradient of `deform_conv_forward`, times `scale`, to `grad_weight`."""
    gradients = _plain_gradients(grad_output, input, grad_weight, offset, geometry)  # which does not need the weight
    grad_weight.add_(gradients[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Fills `output` with a deformable convolution whose taps are also weighted by `mask`."""
    bias = bias if with_bias else input.new_zeros(weight.shape[0])
    output.copy_(_deform_conv2d(input, weight, offset, mask, bias, _modulated_geometry(geometry), True))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: Any,
) -> None:
    """Fills all gradients of `modulated_deform_conv_forward`."""
    bias = bias if with_bias else input.new_zeros(weight.shape[0])
    arguments = (input, weight, offset, mask, bias)
    gradients = _deform_conv2d_backward(grad_output, *arguments, _modulated_geometry(geometry), True)
    targets = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias if with_bias else None)
    for target, gradient in zip(targets, gradients, strict=True):
        if target is not None:
            target.copy_(gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `output` (N, C) with the focal loss of each class's own sigmoid.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5.

    Args:
        input: Logits (N, C).
        target: (N,), classes; C or more is background, which is no class.
        weight: (C,), factor of a row by its class; empty for none.
        output: (N, C).
        gamma: Focus on hard examples.
        alpha: Share of the positives.
    """
    logits, positive, p, log_p, log_q = _focal_terms(input, target)
    hit = -alpha * (1 - p) ** gamma * log_p
    miss = -(1 - alpha) * p**gamma * log_q
    output.copy_(torch.where(positive, hit, miss) * _row_weights(logits, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `grad_input` (N, C) with the derivative of each entry of `sigmoid_focal_loss_forward`."""
    logits, positive, p, log_p, log_q = _focal_terms(input, target)
    hit = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
    miss = -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p)
    grad_input.copy_(torch.where(positive, hit, miss) * _row_weights(logits, target, weight))


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention: sums of bilinear samples of all maps.

    Source: Zhu et al. 2021 (arXiv 2010.04159), equation 3.

    Args:
        value: (B, keys, heads, D): the maps' pixels, one map behind the other.
        spatial_shapes: (L, 2), height and width of each map.
        level_start_index: (L,), unused: it follows from the shapes.
        sampling_locations: (B, Q, heads, L, P, 2), x and y in units of the map.
        attention_weights: (B, Q, heads, L, P).
        im2col_step: Unused.

    Returns:
        (B, Q, heads * D).
    """
    values, locations, weights = (_widened(x) for x in (value, sampling_locations, attention_weights))
    return _sample_maps(values, spatial_shapes, locations, weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fills the gradients of `ms_deform_attn_forward`; see there for the arguments."""
    with torch.enable_grad():
        inputs = [_widened(x.detach()).requires_grad_() for x in (value, sampling_locations, attention_weights)]
        output = _sample_maps(inputs[0], spatial_shapes, inputs[1], inputs[2])
        gradients = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)


OPERATORS: dict[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        roi_pool_forward,
        roi_pool_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
    )
}


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _pairwise_iou(boxes: Tensor, offset: int) -> Tensor:
    corner, end = boxes[:, :2], boxes[:, 2:] + offset
    areas = (end - corner).prod(1)
    sides = torch.minimum(end[:, None], end) - torch.maximum(corner[:, None], corner)
    shared = sides.clamp(min=0).prod(2)
    return shared / (areas[:, None] + areas - shared)


def _soft_weights(overlaps: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == 2:
        return torch.exp(-(overlaps**2) / sigma)
    kept = 1 - overlaps if method == 1 else torch.zeros_like(overlaps)
    return torch.where(overlaps >= iou_threshold, kept, 1.0)


def _drop(places: Tensor, dropped: Tensor) -> Tensor:
    """Removes entries by putting the last one in their place: mmcv's order, which decides among equal scores."""
    kept, gone = places.tolist(), dropped.tolist()
    at = 0
    while at < len(kept):
        if not gone[at]:
            at += 1
            continue
        last, last_gone = kept.pop(), gone.pop()
        if at < len(kept):
            kept[at], gone[at] = last, last_gone
    return places.new_tensor(kept)


def _check_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("RoIAlign without mmcv's compiled operators has pool_mode='avg' only")


def _no_mask(input: Tensor) -> Tensor:
    return input.new_zeros(input.shape[0], 1)


def _plain_geometry(given: dict[str, Any]) -> tuple[int, ...]:
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
    return tuple(given[name] for name in names)


def _modulated_geometry(given: dict[str, Any]) -> tuple[int, ...]:
    names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")
    return tuple(given[name] for name in names)


def _deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    geometry: tuple[int, ...],
    use_mask: bool,
) -> Tensor:
    tensors = (_widened(x) for x in (input, weight, offset, mask, bias))
    return torch.ops.torchvision.deform_conv2d(*tensors, *geometry, use_mask)


def _deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    geometry: tuple[int, ...],
    use_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    tensors = (_widened(x) for x in (grad, input, weight, offset, mask, bias))
    return torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, use_mask)


def _plain_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, given: dict[str, Any]
) -> tuple[Tensor, ...]:
    mask, bias = _no_mask(input), input.new_zeros(weight.shape[0])
    return _deform_conv2d_backward(grad, input, weight, offset, mask, bias, _plain_geometry(given), False)


def _focal_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, where a class is the target, probability, and logarithms of it and of its rest."""
    logits = _widened(input)
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return logits, positive, logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)


def _row_weights(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(N, 1); mmcv's kernel would read beyond `weight` in rows of background, which count once here."""
    if weight.numel() == 0:
        return logits.new_ones(1, 1)
    with_background = torch.cat((weight.to(logits.dtype), logits.new_ones(1)))
    return with_background[target.clamp(max=len(weight))][:, None]


def _sample_maps(values: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = values.shape
    sizes = [(int(height), int(width)) for height, width in spatial_shapes.tolist()]
    total = values.new_zeros(batch * heads, dim, locations.shape[1])
    for level, part in enumerate(values.split([height * width for height, width in sizes], dim=1)):
        level_map = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, *sizes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, P, 2)
        samples = F.grid_sample(level_map, grid, align_corners=False)  # (B * heads, D, Q, P)
        factors = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (samples * factors).sum(-1)
    return total.reshape(batch, heads * dim, -1).transpose(1, 2).contiguous()
