"""Torch's settings are the calling program's: nothing depends on them, and they are as they were
afterwards."""

import ast
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lorafuse
from lorafuse.arithmetic.torch_state import own_torch_state

FIXTURES = Path(__file__).parents[2] / "fixtures"
PACKAGE = Path(lorafuse.__file__).parent
MADE = {"empty", "zeros", "ones", "full", "tensor", "eye", "linspace", "rand", "randn", "as_tensor"}
SETTINGS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul")]


def files(out):
    """Every file of a result but its receipt."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lorafuse_receipt.json"}


@contextmanager
def setting(set_it, new, old):
    set_it(new)
    try:
        yield
    finally:
        set_it(old)


def precision(backend, op, value):
    set_it = torch._C._set_fp32_precision_setter
    return setting(lambda v: set_it(backend, op, v), value, "none")


class Functions(TorchFunctionMode):
    """Makes every sum another."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made + 1 if isinstance(made, torch.Tensor) and made.dtype == torch.float32 else made


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was seen")


STATES = {
    "bf16 by default": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16 by default": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "meta by default": lambda: setting(torch.set_default_device, "meta", None),
    "on meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "medium products": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "tf32": lambda: precision("generic", "all", "tf32"),
    "tf32 products": lambda: precision("cuda", "matmul", "tf32"),
    "bf16 products": lambda: precision("mkldnn", "matmul", "bf16"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "denormals are 0": lambda: setting(torch.set_flush_denormal, True, False),
    "functions seen": Functions,
    "operations seen": Dispatch,
    "fake tensors": FakeTensorMode,
    "three threads": lambda: setting(torch.set_num_threads, 3, torch.get_num_threads()),
}  # fmt: skip


def state():
    """All of torch's settings, and what a new thread has."""
    there = []
    thread = threading.Thread(target=lambda: there.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError as e:  # the newer settings contradict it
        older = str(e)[:40]
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return {
        "dtype": torch.get_default_dtype(), "modes": modes, "threads": torch.get_num_threads(), "new": there,
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")], "older": older,
        "products": [torch._C._get_fp32_precision_getter(*key) for key in [("generic", "all"), *SETTINGS]],
        "deterministic": torch.are_deterministic_algorithms_enabled(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }  # fmt: skip


def flushes():
    return (torch.full((1,), 1e-40) * 1).item() == 0


@pytest.mark.parametrize(
    ("name", "base_kind"),
    [("lora", "nf4_dq"), ("beft", "fp32"), ("osf", "fp32"), ("randlora", "fp32"), ("deft", "fp32")],
)
def test_nothing_depends_on_the_state(name, base_kind, trained, tmp_path):
    """Bytes, whatever the type; and the settings are what they were."""
    made = trained(name, base_kind)
    lorafuse.convert(made.ckpt, made.adapter, tmp_path / "plain")
    expected = files(tmp_path / "plain")
    for number, (strange, enter) in enumerate(STATES.items()):
        with enter() if strange not in ("fake tensors", "operations seen") else nullcontext():
            before = state()
        with enter():
            out = tmp_path / str(number)
            lorafuse.convert(made.ckpt, made.adapter, out)
            checked = lorafuse.verify(out, ckpt=made.ckpt, adapters=[made.adapter])
            described = lorafuse.inspect(made.adapter)
            flushed = flushes() if strange == "denormals are 0" else None
        with enter() if strange not in ("fake tensors", "operations seen") else nullcontext():
            assert state() == before, strange
        assert files(out) == expected, strange
        assert checked["weights"] and described["problems"] == [], strange
        assert flushed in (None, True)


def test_the_state_within():
    """Torch's own, also for threads that begin in it."""
    own = state()
    for strange in ("bf16 by default", "deterministic", "tf32", "medium products", "autocast", "on meta"):
        with STATES[strange](), own_torch_state():
            within = state()
            assert torch.empty(1).device.type == "cpu"
        differing = {"threads", "products", "modes"}  # modes are there, and have no effect
        assert {k: v for k, v in within.items() if k not in differing} == {
            k: v for k, v in own.items() if k not in differing
        }
        assert within["threads"] == 1 and within["products"][2::2] == ["ieee", "ieee"]


def test_precisions_are_restored_with_what_they_inherit():
    """A setting that is read is what holds; whether it is inherited shows when the one above changes."""
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    general = ("generic", "all")

    def seen():
        made = []
        for value in ("ieee", "tf32", read(*general)):
            write(*general, value)
            made.append(state()["products"] + [state()["older"]])
        return made

    values = ("none", "tf32", "ieee")
    try:
        for older, cuda, cuda_products, products in product(
            ("highest", "medium"), values, values, (*values, "bf16")
        ):
            torch.set_float32_matmul_precision(older)
            for key, value in zip([*SETTINGS[:2], SETTINGS[3]], (cuda, cuda_products, products), strict=True):
                write(*key, value)
            before = seen()
            with own_torch_state():
                pass
            assert seen() == before, (older, cuda, cuda_products, products)
    finally:
        torch.set_float32_matmul_precision("highest")
        for key in SETTINGS:
            write(*key, "none")


def test_threads_that_convert_at_once_restore_the_state(tmp_path):
    """The last one out does, whoever came first."""
    ckpt, adapter = FIXTURES / "llama-nf4", FIXTURES / "llama-adapter"
    lorafuse.convert(ckpt, adapter, tmp_path / "plain")
    expected = files(tmp_path / "plain")
    n_before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("high")
        torch.set_default_dtype(torch.float64)
        before = state()
        for turn in range(2):
            outs = [tmp_path / f"{turn}-{number}" for number in range(5)]

            def convert(number, outs=outs):
                time.sleep(number * 0.013)
                lorafuse.convert(ckpt, adapter, outs[number])

            threads = [threading.Thread(target=convert, args=(number,)) for number in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert state() == before
            assert all(files(out) == expected for out in outs)
    finally:
        torch.set_num_threads(n_before)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)


def test_every_tensor_has_its_dtype():
    """Another thread of the program, loading a model, may change the default at any moment."""
    without = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in MADE and "dtype" not in {k.arg for k in node.keywords}:
                without.append(f"{path.name}:{node.lineno}")
    assert not without


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_the_settings_are_asked_for_without_an_op():
    """The first op of a process maps 3 MB of torch's libraries, also where only a plan is made."""
    code = (
        "import torch; from lorafuse.arithmetic.torch_state import own_torch_state; "
        "mapped = lambda: int(open('/proc/self/statm').read().split()[2]) * 4096; "
        "before = mapped(); own_torch_state().__enter__(); print(mapped() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 1_000_000
