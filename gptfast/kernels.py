"""Bridge: the Triton kernels live in the top-level folder kernels/ and are imported as gptfast.kernels.<op>."""

from pathlib import Path

_here = Path(__file__).parent  # a wheel carries them in gptfast/kernels/, a checkout beside gptfast/
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
