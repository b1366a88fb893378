"""Bytes that training sends between GPUs in a step, and the least time that their links take for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitrail.tools._common.plan_memory import Unit


@dataclass(frozen=True)
class Cluster:
    """GPUs in equal hosts.

    Attributes:
        gpus: Of all hosts together.
        per_host: Of one host.
        inside: Bytes a second that a GPU sends to others of its host, while it receives as many.
        between: Bytes a second that a GPU sends to other hosts, while all GPUs of its host do the same.
    """

    gpus: int
    per_host: int
    inside: float
    between: float

    @property
    def hosts(self) -> int:
        return self.gpus // self.per_host


@dataclass(frozen=True)
class Traffic:
    """What every GPU sends in a step; it receives as much.

    Attributes:
        inside: Bytes to GPUs of its host.
        between: Bytes to other hosts.
        collectives: Number of operations that this takes.
    """

    inside: float
    between: float
    collectives: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.inside + other.inside, self.between + other.between, self.collectives + other.collectives
        )  # fmt: skip

    def seconds(self, cluster: Cluster) -> float:
        """The least time: both kinds of links busy all the time, at once."""
        return max(self.inside / cluster.inside, self.between / cluster.between)


def all_gather(nbytes: float, cluster: Cluster) -> Traffic:
    """Every GPU has an equal part of `nbytes` and gets the others.

    GPUs of the same place in their hosts exchange their parts over the network, then those of a host pass on what they
    got: `(h - 1) / h * nbytes / g` between `h` hosts and `(g - 1) / g * nbytes` inside a host of `g` GPUs.
    """
    members = min(cluster.per_host, cluster.gpus)
    inside = (members - 1) / members * nbytes
    between = (cluster.hosts - 1) / cluster.hosts * nbytes / members if cluster.hosts > 1 else 0.0
    return Traffic(inside, between, 1)


def reduce_scatter(nbytes: float, cluster: Cluster) -> Traffic:
    """Every GPU has `nbytes` and gets an equal part of their sum: an all-gather backwards."""
    return all_gather(nbytes, cluster)


def all_reduce(nbytes: float, cluster: Cluster) -> Traffic:
    """Every GPU has `nbytes` and gets their sum: a reduce-scatter and an all-gather in one operation."""
    both = reduce_scatter(nbytes, cluster) + all_gather(nbytes, cluster)
    return Traffic(both.inside, both.between, 1)


def replicas_traffic(gradient_bytes: int, bucket_bytes: int, cluster: Cluster) -> Traffic:
    """DDP: one all-reduce for every bucket of gradients; the first one holds 1 MiB."""
    first = min(gradient_bytes, 2**20)
    buckets = 1 + -(-(gradient_bytes - first) // bucket_bytes)
    whole = all_reduce(gradient_bytes, cluster)
    return Traffic(whole.inside, whole.between, buckets)


def shards_traffic(units: Sequence[Unit], gradient_bytes_each: int, cluster: Cluster) -> Traffic:
    """`fully_shard`: weights are gathered for the forward pass, most once more for the backward; gradients are reduced.

    Args:
        units: What is gathered as one.
        gradient_bytes_each: Of one number of a gradient while it is reduced.
        cluster: The GPUs.
    """
    total = Traffic(0.0, 0.0, 0)
    for unit in units:
        for _ in range(2 if unit.reshard else 1):
            total += all_gather(unit.nbytes, cluster)
        total += reduce_scatter(unit.numel * gradient_bytes_each, cluster)
    return total
