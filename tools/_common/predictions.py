"""Predictions as JSON and as label images, for `vitrail.tools.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitrail.models.mm.inference import Classification, Result, Segmentation


def to_json(result: Result, classes: Sequence[str]) -> dict[str, Any]:
    """The figures of a prediction.

    Args:
        result: The prediction.
        classes: Names by class number.

    Returns:
        For a classification `classes`, best first, with `class`, `label` (number) and `score`. For a detection
        `objects`, best first, with the same, `box` (left, top, right, bottom in pixels) and, where there are masks,
        `mask` in COCO's compressed run-length code. For a segmentation `classes` that occur, largest first, with
        `pixels` and `share` of the image.
    """
    if isinstance(result, Segmentation):
        present, counts = np.unique(result.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {
            "classes": [
                {"class": classes[present[i]], "label": int(present[i])}
                | {"pixels": int(counts[i]), "share": float(counts[i] / result.labels.size)}
                for i in order
            ]
        }
    rows = [
        {"class": classes[label], "label": int(label), "score": float(score)}
        for label, score in zip(result.labels, result.scores, strict=True)
    ]
    if isinstance(result, Classification):
        return {"classes": rows}
    for i, row in enumerate(rows):
        row["box"] = [round(float(x), 2) for x in result.boxes[i]]
        if result.masks is not None:
            row["mask"] = _run_lengths(result.masks[i])
    return {"objects": rows}


def label_image(result: Result, num_classes: int) -> Image.Image | None:
    """A segmentation's class numbers as a grey image of 8 bits (16 for more than 256 classes); None for other kinds."""
    if not isinstance(result, Segmentation):
        return None
    return Image.fromarray(result.labels.astype(np.uint8 if num_classes <= 256 else np.uint16))


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(extent) for extent in code["size"]], "counts": code["counts"].decode()}
