"""The same numbers, lying in memory in other ways."""

import torch


def turned(x):
    """In columns that lie one after the other."""
    return x.mT.contiguous().mT


def gapped(x):
    """In rows that lie apart."""
    return torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]


def scattered(x):
    """With neither rows nor columns dense."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
