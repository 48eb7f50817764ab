"""The cold store: vLLM's paged cache itself, on the tier that has room for it.

vLLM allocates one tensor for the pages of all layers. Here that tensor is a file's pages, mapped
into memory (``disk``), or ordinary memory (``host``); vLLM's scheduler sees one large cache and
knows nothing of it. What the kernel writes goes through the mapping; what the hot pool misses is
read by position, so that a failing disk gives an error and not a signal.

The file belongs to one process. It has no name once it is open, so nothing is left behind by a
crash, and its space is reserved when it is made, so a disk that others fill up cannot break writes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import psutil
import torch

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from kvplug.config import OffloadConfig
    from kvplug.offload.host_store import HostStore

GIB = 2**30
LOCK = "kvplug.lock"
"""File in the folder whose lock says that an engine uses it."""
RELEASE_AFTER = 32 * 2**20
"""Bytes of the mapping that may be in memory before it is given back."""
LEAST_TOUCHED = 2**18
"""Bytes that a step counts for at least: a decoded token touches pages of the system's size."""
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems that would keep the cache in the memory that it is to leave."""

_stores: WeakValueDictionary[int, ColdStore | HostStore] = WeakValueDictionary()


class ColdStore:
    """One worker's pages.

    Args:
        offload: The user's options.
        rank: Of the worker among those that share the folder.

    Raises:
        KvplugError: The folder cannot be used, or another engine uses it.
    """

    def __init__(self, offload: OffloadConfig, rank: int) -> None:
        """Takes the folder's lock, where there is a folder."""
        self.offload, self.rank = offload, rank
        self.fd: int | None = None
        """The file; None in memory."""
        self.address = 0
        self._map: mmap.mmap | None = None
        self._lock: int | None = None
        self._touched = 0
        self.most_mapped = 0
        """Most bytes of the mapping that were in memory, by what was touched of it."""
        if offload.tier == "disk":
            self._lock = lock_folder(offload.path or "", rank)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """``[nbytes]`` int8 zeros that live in the store.

        Raises:
            KvplugError: There is no room.
        """
        if self.offload.tier == "host":
            tensor = torch.zeros(nbytes, dtype=torch.int8)
        else:
            self.fd = _reserve(Path(self.offload.path or ""), self.rank, nbytes)
            self._map = mmap.mmap(self.fd, nbytes)
            tensor = torch.frombuffer(self._map, dtype=torch.int8)
        self.address = tensor.data_ptr()
        register(tensor, self)
        return tensor

    def offset(self, tensor: torch.Tensor) -> int:
        """Where in the file a view of the allocated tensor begins, in bytes."""
        return tensor.data_ptr() - self.address

    def touched(self, nbytes: int) -> None:
        """Bytes of the mapping were written or read; now and then their memory is given back.

        Their content stays with the file.
        """
        if self._map is None:
            return
        self._touched += max(nbytes, LEAST_TOUCHED)
        self.most_mapped = max(self.most_mapped, self._touched)
        if self._touched >= RELEASE_AFTER:
            self._touched = 0
            self._map.madvise(mmap.MADV_DONTNEED)


def register(tensor: torch.Tensor, store: ColdStore | HostStore) -> None:
    """Notes that a tensor lives in a store."""
    _stores[tensor.untyped_storage().data_ptr()] = store


def store_of(tensor: torch.Tensor) -> ColdStore | HostStore | None:
    """The store that a tensor lives in, if it lives in one."""
    return _stores.get(tensor.untyped_storage().data_ptr())


def check_folder(path: str, nbytes: int) -> None:
    """Refuses a folder that could not hold ``nbytes``, before anything is loaded.

    vLLM checks its config again once its workers run: what a child process holds is fine.

    Args:
        path: The folder.
        nbytes: Of a worker's pages.

    Raises:
        KvplugError: With the reason.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise KvplugError(f"kvplug option offload.path {path!r} is not a folder: make it first.")
    kind = file_system(folder)
    if kind in IN_MEMORY:
        raise KvplugError(
            f"kvplug option offload.path {path!r} is on {kind}, which is memory: name a folder on "
            f"a disk, or use tier 'host'."
        )
    if is_held_by_family(folder):
        return
    try:
        lock = lock_folder(path, 0)
    except OSError as error:
        raise KvplugError(
            f"kvplug option offload.path {path!r} cannot be written to: {error.strerror}."
        ) from None
    os.close(lock)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise KvplugError(
            f"kvplug option offload.cold_gib asks for {nbytes / GIB:.1f} GiB, and {path!r} has "
            f"{free / GIB:.1f} GiB free."
        )


def is_held_by_family(folder: Path) -> bool:
    """Whether this process or one that it started is the last that took the folder."""
    try:
        process = psutil.Process(int((folder / f"0.{LOCK}").read_text()))
        return os.getpid() in (process.pid, *(parent.pid for parent in process.parents()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return False


def lock_folder(path: str, rank: int) -> int:
    """A descriptor that holds the folder's lock for a worker until it is closed.

    Args:
        path: The folder.
        rank: Of the worker.

    Raises:
        KvplugError: Another engine holds it.
        OSError: The folder cannot be written to.
    """
    lock = os.open(Path(path) / f"{rank}.{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise KvplugError(
            f"kvplug option offload.path {path!r} is in use by another engine: name another folder."
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, as the kernel names it; '' if it does not."""
    best, kind, place = -1, "", str(folder.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        mount = fields[4]
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), fields[fields.index("-") + 1]
    return kind


def nameless_file(path: Path) -> int:
    """A descriptor of a new file at ``path`` that is gone from there at once, whatever happens.

    Raises:
        OSError: It cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


def _reserve(folder: Path, rank: int, nbytes: int) -> int:
    """A file of ``nbytes`` without a name, whose space is reserved.

    Raises:
        KvplugError: There is no room, or the folder cannot be written to.
    """
    try:
        fd = nameless_file(folder / f"{rank}.{os.getpid()}.kvfile")
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        words = "is full" if error.errno == errno.ENOSPC else f"failed: {error.strerror}"
        raise KvplugError(
            f"kvplug could not reserve {nbytes / GIB:.1f} GiB for the cold store: {str(folder)!r} "
            f"{words}."
        ) from None
    # Pages are read one by one, in no order.
    os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_RANDOM)
    return fd
