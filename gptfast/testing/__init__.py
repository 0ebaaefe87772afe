"""The proof of every op, defined once; a pytest plugin (-p gptfast.testing).

    tolerance.py   when a result counts as right: assert_close_to_reference, and the wrong results that it must reject
    samples.py     values and memory layouts of test inputs
    checks.py      Target (a backend and a dtype), check_op: a kernel against eager in float64
    session.py     fixtures target, data_file, backend_choice; GPTFAST_REQUIRE; executed rows and seconds printed at the end

Importing this imports no torch: a plugin is loaded before pytest knows what it will run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptfast.testing.session import (
    backend_choice_fixture,
    cxx,
    data_file_fixture,
    find_data,
    pytest_addoption,
    pytest_configure,
    pytest_generate_tests,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    record,
    required,
    requires,
    seed_fixture,
    target_fixture,
    unavailable,
)

if TYPE_CHECKING:
    from gptfast.testing.checks import Target, check_op, evaluate, forced_isa, poisoned, same_bits
    from gptfast.testing.samples import LAYOUTS, SIZES, arrange, copy_of, random
    from gptfast.testing.tolerance import assert_close_to_reference, assert_rejected, wrong_results

_HOME = {
    name: f"gptfast.testing.{module}"
    for module, names in {
        "checks": ("Target", "check_op", "evaluate", "forced_isa", "poisoned", "same_bits"),
        "samples": ("LAYOUTS", "SIZES", "arrange", "copy_of", "random"),
        "tolerance": ("assert_close_to_reference", "assert_rejected", "wrong_results"),
    }.items()
    for name in names
}

__all__ = [
    "LAYOUTS", "SIZES", "Target", "arrange", "assert_close_to_reference", "assert_rejected", "backend_choice_fixture", "check_op",
    "copy_of", "cxx",
    "data_file_fixture", "evaluate", "find_data", "forced_isa", "poisoned", "pytest_addoption", "pytest_configure",
    "pytest_generate_tests", "pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary", "random",
    "record", "required", "requires", "same_bits", "seed_fixture", "target_fixture", "unavailable", "wrong_results",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptfast.testing' has no attribute {name!r}")
