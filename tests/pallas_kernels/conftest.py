import dataclasses
import zlib

import pytest

pytest.register_assert_rewrite(
    "tests.pallas_kernels.decode_experts.cases",
    "tests.pallas_kernels.decode_experts.layout_suite",
    "tests.pallas_kernels.decode_experts.lowering_suite",
    "tests.pallas_kernels.router.cases",
)

from pallas_kernels.decode_experts import LAYOUTS  # noqa: E402


@pytest.fixture
def seed(request) -> int:
    """The test's own: other inputs in every test, the same in every run."""
    return zlib.crc32(request.node.name.encode())


def pytest_generate_tests(metafunc):
    # One test for each field of the suite's Config, which a base class cannot know.
    if "config_field" in metafunc.fixturenames:
        config = LAYOUTS[metafunc.cls.layout].Config
        metafunc.parametrize("config_field", [field.name for field in dataclasses.fields(config)])
