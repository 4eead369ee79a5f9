"""Where arrays live: the device, and the scratch memory of each worker."""

import torch

from lorafuse.arithmetic import kernel, lanes
from lorafuse.files.stores import Store


def host_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the host, writable, not copied."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, their stubs do not say so


# The scratch that a codec decodes to fp32 in. Once the tile is in the narrower dtype of its quant_state, the
# sum may use it: a buffer less that has to stay in cache.
DECODED_FP32 = "decoded.fp32"


class Arena:
    """Named scratch tensors of one worker, made once and grown when a larger one is asked for. `device`:
    where arithmetic is done; `on_host`: that is the CPU, which decides the implementation, with `kernel`, the
    compiled one, where it is to be used."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._lane = device, lanes.lane_of(device)
        self._staging = lanes.Staging(self._lane) if self._lane else None
        self.on_host = self._lane is None
        self.kernel = kernel.chosen() if self.on_host else None
        self._pool: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._on_host: Arena | None = None

    def bind(self) -> None:
        """The calling thread is the worker, until it ends."""
        if self._lane:
            self._lane.bind()

    def settle(self) -> None:
        """Returns when all is done that was begun on the device: only then the host reads what came back, and
        other threads use what was made. Raises what went wrong there."""
        if self._staging:
            self._staging.settle()

    def get(self, name: str, numel: int, dtype: torch.dtype, *, host: bool = False) -> torch.Tensor:
        """An uninitialised 1-D tensor [numel]; the one of the last call with that name is no longer valid.
        `host`: on the host, from where a device copies by itself."""
        if host and self._staging:
            return self._staging.get(name, numel * dtype.itemsize).view(dtype)
        tensor = self._pool.get((name, dtype))
        if tensor is None or tensor.numel() < numel:
            tensor = torch.empty(numel, dtype=dtype, device=self.device)
            self._pool[name, dtype] = tensor
        return tensor[:numel]

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the host, in memory of its own, for what is brought back."""
        if self._lane:
            return self._lane.pinned(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    @property
    def host(self) -> "Arena":
        """The scratch on the host of the same worker: the arena itself where that is its device."""
        if self.on_host:
            return self
        self._on_host = self._on_host or host_arena()
        return self._on_host

    def here(self, values: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The values (1-D) in `dtype` on the arena's device: themselves, or a copy in scratch."""
        if values.dtype == dtype and values.device == self.device:
            return values
        return self.get(name, values.numel(), dtype).copy_(values)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the arena's device."""
        return self._staging.copy_in(tensor) if self._staging else tensor

    def table(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same of a tensor that lasts as long as the arena and does not change: it is copied once."""
        if self.on_host:
            return tensor
        # With the tensor, lest another gets its id.
        if id(tensor) not in self._tables:
            self._tables[id(tensor)] = tensor, self.place(tensor)
        return self._tables[id(tensor)][1]

    def beside(self, host: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor like `host` (1-D) on the arena's device: scratch, or `host` itself where that is the
        host."""
        return host if self.on_host else self.get(name, host.numel(), host.dtype)

    def bring_back(self, values: torch.Tensor, host: torch.Tensor) -> None:
        """Copies what was made `beside` a part of a host buffer into it, where that is not the same; it is
        there after `settle`."""
        if self._lane:
            self._lane.copy_out(values, host)

    def fetch(self, name: str, store: Store, key: str, start: int, nbytes: int) -> torch.Tensor:
        """Bytes [start, start + nbytes) of a stored tensor, uint8 [nbytes] on the host."""
        buffer = self.get(name, nbytes, torch.uint8, host=True)
        if nbytes:
            store.read_into(key, start, host_view(buffer))
        return buffer


def to_device_of(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A small tensor of the host where the values are; nothing waits for it."""
    return tensor.to(values.device, non_blocking=True)


def transposed(values: torch.Tensor, n_rows: int, n_cols: int, name: str, arena: Arena) -> torch.Tensor:
    """The transpose of [n_rows, n_cols], 1-D."""
    turned = arena.get(name, values.numel(), values.dtype)
    turned.view(n_cols, n_rows).copy_(values.view(n_rows, n_cols).T)
    return turned


def put(buffer: torch.Tensor, at: int, tensor: torch.Tensor) -> int:
    """Copies the bytes of `tensor` (1-D) to byte `at` of the buffer. Returns where they end."""
    raw = tensor.contiguous().view(torch.uint8)
    buffer[at : at + raw.numel()].copy_(raw)
    return at + raw.numel()


def host_arena() -> Arena:
    """Scratch on the host."""
    return Arena(torch.device("cpu"))
