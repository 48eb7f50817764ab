"""Compiles what pools call, before the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvplug.offload.gather import copy_pages
from kvplug.offload.hot_pool import HotPool
from kvplug.offload.links import Links
from kvplug.offload.place import find_rows
from kvplug.offload.written import Written

if TYPE_CHECKING:
    from kvplug.offload.cold_store import ColdStore


def warm_up(kv_cache: torch.Tensor, store: ColdStore) -> None:
    """Compiles what a pool calls, on the first pages of a layer, before there is anything in them.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]``, at least two pages.
        store: What it is in.
    """
    _, heads, page, _ = kv_cache.shape
    links = Links(2)
    pool = HotPool(kv_cache[:2], store, 2 * heads, links)
    pool.next = HotPool(kv_cache[:2], store, 2 * heads, links)
    written = Written.of(torch.tensor([0, 1]), page)
    table = np.ascontiguousarray(np.arange(2 * heads, dtype=np.int32).reshape(2, heads).T)
    table = np.concatenate((table, table))
    lengths, slots = np.full(2 * heads, 2 * page, np.int32), np.empty_like(table)
    shares = np.ones(table.shape, np.float32) if store.offload.eviction == "mass" else None
    for each in (pool.next, pool):
        for _ in each.turns(table, lengths, slots, written, shares):
            pass
        each.rewrite(written)
    find_rows(pool._state, table, lengths, page, slots)
    one = np.zeros(1, np.int32)
    copy_pages(0, pool._places, one, one)
    if pool._ahead is not None:
        pool._ahead.warm_up()
