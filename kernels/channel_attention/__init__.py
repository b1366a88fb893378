"""Attention between the channels of a group, global over the map and linear in its size."""

from vitrail.kernels.channel_attention.api import channel_attention, channel_attention_packed

__all__ = ["channel_attention", "channel_attention_packed"]
