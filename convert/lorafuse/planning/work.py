"""How much there is to compute, to choose the device by."""

from lorafuse.arithmetic.devices import Work
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.patches.patch import TILE_NUMEL
from lorafuse.planning.memory import fits_device
from lorafuse.planning.plan import Plan, Step

# Elements in a stored one, of the dtypes that mostly hold codes of 4 bits.
_CODES = {"U8": 2, "I32": 8}


def work_of(plan: Plan) -> Work:
    """Of a plan: of the weights whose values are needed."""
    steps = [step for step in plan.steps if step.encoder.needs_values]
    n_elements = sum(step.spec.numel for step in steps)
    return Work(
        n_elements=n_elements,
        n_products=sum(step.spec.numel * _rank(step) for step in steps),
        n_tiles=sum(-(-step.spec.numel // TILE_NUMEL) for step in steps),
        in_nbytes=sum(_stored_nbytes(step) for step in steps),
        out_nbytes=sum(step.nbytes for step in steps),
        n_workers=plan.memory.n_workers,
        fits=fits_device(plan.memory),
    )


def _rank(step: Step) -> int:
    return sum(int(patch.facts.get("rank") or 0) for patch in step.patches)


def _stored_nbytes(step: Step) -> int:
    return sum(step.sources.store.tensors[name].spec.nbytes for name in step.sources.names)


def work_of_batch(base: Checkpoint, n_results: int, n_workers: int) -> Work:
    """About that of so many results, before any of them is planned: by what the base stores."""
    specs = [info.spec for info in base.tensors.values()]
    n_elements = n_results * sum(spec.numel * _CODES.get(spec.dtype, 1) for spec in specs)
    return Work(
        n_elements=n_elements,
        n_products=0,
        n_tiles=-(-n_elements // TILE_NUMEL),
        in_nbytes=sum(spec.nbytes for spec in specs),
        out_nbytes=2 * n_elements,
        n_workers=n_workers,
    )
