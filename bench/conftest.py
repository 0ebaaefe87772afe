"""Options that every benchmark understands, and those of bench_train.py and bench_generate.py."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-compile", action="store_true", help="also time torch.compile's form of each op (default: off)")
    group = parser.getgroup("bench_train")
    group.addoption("--nanogpt", metavar="PATH", help="a checkout of github.com/karpathy/nanoGPT: a peer of its own")
    group.addoption("--candidates", metavar="A,B", help="only these candidates (default: all that run here)")
    group.addoption("--rounds", type=int, default=5, help="samples a candidate (default and minimum: 5)")
    group.addoption("--curve-steps", type=int, help="steps of the loss curves (default: 100, fewer for the larger models)")
    group.addoption("--memory-steps", type=int, default=20, help="steps before the peak memory is read (default: 20)")
    group.addoption("--profile", action="store_true", help="print where a step of gptfast spends its time, by op")
    group = parser.getgroup("bench_generate")
    group.addoption("--models", metavar="FOLDER", help="where bench/peers/make_models.py wrote its models")
