"""DiNAT-N on scikit-learn's handwritten digits, minutes on a laptop's CPU.

Source of the recipe: our own.
"""

_base_ = "_digits.py"

model = dict(backbone=dict(name="dinat_n", num_classes=10, drop_path_rate=0.05), label_smoothing=0.1)
