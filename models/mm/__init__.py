"""The bridge between the models and the OpenMMLab runner; nothing else in the package imports mmengine.

`import vitrail` does not import this package. The classification modules register their parts with mmengine's root
registries when `vitrail.models.mm.runner` is imported:

- `images`, `datasets`, `samplers`: from files to batches, deterministic in (seed, epoch, index);
- `classifier`, `optim`: the trained module, its optimizer and mixed precision;
- `checkpoint`, `hooks`, `progress`, `metrics`: what happens around the iterations;
- `runner`: puts a config together and runs it; `report`: what is left at the end.

Detectors and segmenters come from mmdetection and mmsegmentation, with their kind of configs:

- `backbone`: any model as their backbone; `vwformer`: heads and pixel decoders;
- `ops`: stands in for mmcv's compiled operators (`_operators`), where these are missing;
- `dense_runner`, `dense_hooks`, `dense_report`: what `runner`, `hooks` and `report` are for classifiers;
- `dense_data`, `dense_data_check`, `data_findings`: what the data must be, and what is wrong with them.

Detectors for LiDAR scans are our own:

- `point_readers`, `point_augment`, `point_data`: from scans and boxes to batches;
- `point_detector`, `center_head`: the trained module; `point_metric`, `point_report`: what is found of it.

`parallel` and `sharding` spread training over processes. `inference` applies trained models of the first three kinds to
single images.
"""
