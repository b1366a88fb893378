"""ScatterFormer on KITTI's 3D objects: cars, pedestrians, cyclists.

`data_root` holds `training/{velodyne/*.bin,label_2/*.txt,calib/*.txt}` and `ImageSets/{train,val}.txt`, a scan's number
a line, as KITTI and the usual split have it. Another place: --cfg-options data_root=FOLDER. Images are not read.

Source of the recipe: see `_scatterformer.py`; our own, for the authors have none for KITTI.
"""

_base_ = "_scatterformer.py"

model = dict(backbone=dict(name="scatterformer_kitti"))
