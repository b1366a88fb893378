"""Layers: `nn.Module`s that own parameters, each built on one operator of `vitrail.kernels`.

They work on maps of shape (B, H, W, C) of any height and width; `strip` alone, made for convolutional networks, on
(B, C, H, W). `voxels`, `sparse` and `scattered` work on the voxels of LiDAR scans, `rotated_boxes` and `bev` on the
view from above.
"""
