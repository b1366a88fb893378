"""Which images make up an epoch, on every process: permutations of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler, Sampler

from vitrail.models.mm.datasets import SampleKey
from vitrail.models.mm.seeding import derive_seed


@DATA_SAMPLERS.register_module()
class ShuffledSampler(Sampler[SampleKey]):
    """A new order every epoch, dealt out to the processes like cards.

    Batch k of all processes together holds the same images as batch k of one process with the whole batch. The last
    images of the order that do not go round are left out of that epoch.

    Args:
        dataset: Only its length counts.
        seed: Of the order.
    """

    def __init__(self, dataset: Sized, seed: int = 0) -> None:
        self.rank, self.world_size = get_dist_info()
        self.length = len(dataset)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for turn in range(len(self)):
            position = turn * self.world_size + self.rank
            yield SampleKey(self.epoch, position, order[position])


@DATA_SAMPLERS.register_module()
class RepeatedSampler(RepeatAugSampler):
    """Repeated augmentation: every image of an epoch comes `num_repeats` times, differently augmented.

    An epoch keeps its length, so it sees a third of the images with three repeats. Source: Hoffer et al. 2020, in
    the form of DeiT's training code, which timm carries.
    """

    def __init__(self, dataset: Sized, seed: int = 0, num_repeats: int = 3) -> None:
        rank, world_size = get_dist_info()
        super().__init__(dataset, num_replicas=world_size, rank=rank, num_repeats=num_repeats)
        self.seed = seed
        self.shown_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.shown_epoch = epoch
        super().set_epoch(derive_seed("order", self.seed, epoch))  # timm seeds its order by the epoch alone

    def __iter__(self) -> Iterator[SampleKey]:
        for turn, index in enumerate(super().__iter__()):
            yield SampleKey(self.shown_epoch, turn * self.num_replicas + self.rank, int(index))


@DATA_SAMPLERS.register_module()
class EverySampler(Sampler[SampleKey]):
    """Every image exactly once over all processes, in order; some processes may get one image more than others."""

    def __init__(self, dataset: Sized, seed: int = 0) -> None:
        self.rank, self.world_size = get_dist_info()
        self.length = len(dataset)

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, index, index) for index in range(self.rank, self.length, self.world_size))


@DATA_SAMPLERS.register_module()
class WholeStepBatchSampler(BatchSampler):
    """Full batches only, and a number of them that is a multiple of the batches that make up one optimizer step.

    So no epoch ends with half-accumulated gradients, which a checkpoint would lose.

    Raises:
        ValueError: The data are not enough for one step.
    """

    def __init__(self, sampler: Sampler[SampleKey], batch_size: int, accumulate: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last=True)
        self.accumulate = accumulate
        if len(self) == 0:
            raise ValueError(
                f"a process gets {len(sampler)} images an epoch, too few for one step of {accumulate} batches of "
                f"{batch_size}; use a smaller train_dataloader.batch_size"
            )

    def __len__(self) -> int:
        return super().__len__() // self.accumulate * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for _, batch in zip(range(len(self)), super().__iter__(), strict=False):
            yield batch
