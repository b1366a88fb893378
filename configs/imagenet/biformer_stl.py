"""BiFormer-STL (the Swin-T layout of the ablation) on ImageNet-1k; published 82.7 % top-1.

Source: Zhu et al., CVPR 2023; the rest is in `_biformer.py`. Drop path 0.1.
"""

_base_ = "_biformer.py"

model = dict(backbone=dict(name="biformer_stl", drop_path_rate=0.1))
