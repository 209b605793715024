import pytest

# Before any folder's tests import it: the model's use it too.
pytest.register_assert_rewrite("tests.pallas_kernels.machine")

import tests.quick_process  # noqa: E402, F401
