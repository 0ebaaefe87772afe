"""Options that every benchmark understands."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-compile", action="store_true", help="also time torch.compile's form of each op (default: off)")
