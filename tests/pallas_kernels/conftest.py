import dataclasses
import zlib

import pytest

pytest.register_assert_rewrite(
    "tests.pallas_kernels.decode_experts.cases",
    "tests.pallas_kernels.decode_experts.layout_suite",
    "tests.pallas_kernels.decode_experts.lowering_suite",
    "tests.pallas_kernels.decode_step.cases",
)

from pallas_kernels.decode_experts import LAYOUTS  # noqa: E402
from tests.pallas_kernels.machine import ON_GPU  # noqa: E402


@pytest.fixture
def seed(request) -> int:
    """The test's own: other inputs in every test, the same in every run."""
    return zlib.crc32(request.node.name.encode())


def pytest_generate_tests(metafunc):
    # The fields of the suite's Config, which a base class cannot know: each by itself on a GPU, all
    # at once interpreted.
    if "config_fields" in metafunc.fixturenames:
        config = LAYOUTS[metafunc.cls.layout].Config
        names = [field.name for field in dataclasses.fields(config)]
        sets, ids = ([[name] for name in names], names) if ON_GPU else ([names], ["all"])
        metafunc.parametrize("config_fields", sets, ids=ids)
