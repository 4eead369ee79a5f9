"""Arguments of a wrong kind are refused by their names, before anything is read."""

import inspect

import pytest
from build import write_adapter, write_checkpoint

import lorafuse
from lorafuse.arguments import _CHECKS
from lorafuse.errors import UsageError

WRONG = {
    "ckpt": (3, "ckpt is 3; expected a path or a hub id."),
    "adapter": (None, "adapter is None; expected a path or a hub id."),
    "out_dir": (b"out", "out_dir is b'out'; expected a path or a hub id."),
    "adapters": ([3], "adapters is [3]; expected a list of paths, hub ids or pairs with a weight."),
    "dtype": (None, "dtype is None; expected one of auto, float32, float16, bfloat16."),
    "max_shard_size": (None, "max_shard_size: 'None' is no size; expected a number with a decimal unit, such "
                             "as 100MB or 5GB."),
    "memory_limit": ("10", "memory_limit: '10' is so many bytes; did you mean 10MB or 10GB?"),
    "keep_dense": (7, "keep_dense is 7; expected a list of strings."),
    "quant_skip": ([7], "quant_skip is [7]; expected a list of strings."),
    "device": (0, "device is 0; expected a string."),
    "adapter_scale": ("2", "adapter_scale is '2'; expected a number."),
    "adapter_name": (b"x", "adapter_name is b'x'; expected a string."),
    "overwrite": ("yes", "overwrite is 'yes'; expected True or False."),
    "dry_run": (1, "dry_run is 1; expected True or False."),
    "base_quant": ("int4", "base_quant is int4; expected one of none, auto, nf4, fp4, int8."),
    "base_quant_from": (4, "base_quant_from is 4; expected a path."),
    "push_to_hub": (3, "push_to_hub is 3; expected a repository or a Push."),
    "on_event": ("print", "on_event is 'print'; expected a function of an event."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_of_convert(name, tmp_path):
    value, message = WRONG[name]
    arguments = {"ckpt": tmp_path, "adapter": tmp_path, "out_dir": tmp_path / "out"} | {name: value}
    with pytest.raises(UsageError) as caught:
        lorafuse.convert(**arguments)
    assert str(caught.value) == message


def test_a_name_that_is_none_of_its_parameters(tmp_path):
    with pytest.raises(TypeError, match=r"^convert\(\) got an unexpected keyword argument 'dtpe'$"):
        lorafuse.convert(tmp_path, tmp_path, tmp_path / "out", dtpe="float16")
    with pytest.raises(TypeError, match=r"^verify\(\) missing a required argument: 'out_dir'$"):
        lorafuse.verify()


def test_the_other_functions_check_theirs(tmp_path):
    for call, message in (
        (lambda: lorafuse.batch(tmp_path, 3, tmp_path), "jobs is 3; expected a path or a hub id."),
        (lambda: lorafuse.verify(tmp_path, ckpt=3), "ckpt is 3; expected a path or a hub id."),
        (lambda: lorafuse.inspect(3), "path is 3; expected a path or a hub id."),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == message


def test_one_string_where_several_are_expected_is_one_of_them(tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    lorafuse.convert(ckpt, lora, tmp_path / "two", adapters=str(lora))
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=str(lora))["weights"]
    plans = [
        lorafuse.convert(ckpt, lora, tmp_path / "nf4", format="nf4", quant_skip=skip, dry_run=True)
        for skip in ("lm_head", ["lm_head"], tuple("lm_head"))
    ]
    assert plans[0]["plan_id"] == plans[1]["plan_id"] != plans[2]["plan_id"]


def test_every_name_that_is_checked_is_a_parameter():
    functions = (lorafuse.convert, lorafuse.batch, lorafuse.verify, lorafuse.inspect)
    assert {
        name for function in functions for name in inspect.signature(function).parameters
    } >= _CHECKS.keys()
