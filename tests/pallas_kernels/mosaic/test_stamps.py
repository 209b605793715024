import re

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.stamps import BEGIN, CORE, END, WAITED, stamp, stamps_type
from tests.pallas_kernels.machine import INTERPRET, ON_GPU, lower_for_cuda, mosaic_modules

PLACES = {"BEGIN": BEGIN, "WAITED": WAITED, "END": END, "CORE": CORE}
NUM_BLOCKS = 3


def numbers(interpret=INTERPRET, stamped: bool = True) -> list[jax.Array]:
    """[3]: each block's number, and its stamps if it has any."""

    def kernel(block_id, out, stamps=None):
        for place in PLACES.values():
            stamp(stamps, block_id, place)
        out[block_id] = block_id

    out_types = [jax.ShapeDtypeStruct((NUM_BLOCKS,), jnp.int32), stamps_type(NUM_BLOCKS)]
    return launch(
        kernel,
        name="numbers",
        num_blocks=NUM_BLOCKS,
        out_type=out_types if stamped else out_types[:1],
        interpret=interpret,
    )()


def test_stamps_of_all_blocks():
    out, stamps = numbers()
    assert out.tolist() == [0, 1, 2]
    assert stamps.shape == (NUM_BLOCKS, len(PLACES)) and stamps.dtype == jnp.int32
    if ON_GPU:
        begin, waited, end, core = np.asarray(stamps).T
        assert (waited - begin >= 0).all() and (end - waited >= 0).all()
        assert (core >= 0).all() and (core < 256).all()


def test_lowered_a_stamp_is_a_register_read_and_a_store():
    [module] = mosaic_modules(lower_for_cuda(lambda: numbers(interpret=False)))
    reads = re.findall(r"mov\.u32 now, %(\w+);.*?st\.global\.u32 \[at\+(\d+)\], now;", module)
    offsets = {place: str(4 * place) for place in PLACES.values()}
    assert reads == [
        *(("globaltimer_lo", offsets[place]) for place in (BEGIN, WAITED, END)),
        ("smid", offsets[CORE]),
    ]


def test_lowered_without_an_array_there_is_no_stamp():
    [module] = mosaic_modules(lower_for_cuda(lambda: numbers(interpret=False, stamped=False)))
    assert "globaltimer" not in module and "smid" not in module
