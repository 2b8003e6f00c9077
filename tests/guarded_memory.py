"""One forward and backward on tensors that end (or begin) where unreadable memory begins: any access outside kills the process.

python guarded_memory.py IMPL DTYPE CLASSES FEATURES VOXELS LAYOUT SIDE
"""

import ctypes
import mmap
import sys

import torch
from loss_cases import channels_last, networks
from truth import compare, leaves

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: torch.Tensor, side: str) -> torch.Tensor:
    """A dense tensor of the same values and strides, with unreadable pages before and after its memory.

    ``side`` says where the tensor lies flush with them: "end" or "start".
    """
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    start = _libc.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise MemoryError("mmap failed")
    for page in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    address = start + PAGE + (pages * PAGE - size if side == "end" else 0)
    memory = (ctypes.c_byte * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=x.dtype)
    copy = flat.as_strided(x.shape, x.stride())
    return copy.copy_(x)


def main() -> None:
    impl, dtype, classes, features, voxels, layout, side = sys.argv[1:]
    logits, feats = networks((int(voxels),), int(classes), int(features), batch=2, dtype=getattr(torch, dtype))
    if layout == "channels_last":
        logits, feats = [channels_last(z) for z in logits], [channels_last(f) for f in feats]
    logits, feats = [guarded(z, side) for z in logits], [guarded(f, side) for f in feats]
    for confidence in ("entropy", None):
        compare(impl, logits, feats, confidence=confidence)
    # Gradients end at the same place: autograd's own allocation is replaced by guarded memory.
    plain = torch.empty_like
    torch.empty_like = lambda x, **keywords: guarded(plain(x, **keywords).zero_(), side)
    import rplib

    z = leaves(logits)
    rplib.functional.reliable_mutual_loss(z, feats, impl=impl).backward()
    print("survived")


if __name__ == "__main__":
    main()
