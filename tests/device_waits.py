"""Notes what makes the program wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Looks(TorchDispatchMode):
    """Notes what has to wait for a device: a tensor's value on the host, or a shape that depends on values."""

    WAIT = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "_to_copy")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = [t for t in (args[1] if name == "index" else ()) if t is not None and t.dtype == torch.bool]
        if masks or (name in self.WAIT and (name != "_to_copy" or kwargs.get("device") is not None)):
            self.found.append(name)
        return func(*args, **kwargs)
