"""tests/test_fuzz.py with many damaged files for each loader (`make fuzz`), and the record of it in tests/campaigns.json:

    python -P tests/fuzz_loaders.py --rounds 3000
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from gptfast.testing import campaigns

ROOT = campaigns.ROOT
SOURCES = ("checkpoint", "config", "data", "hub", "model", "options", "packed", "tokenizer")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -P tests/fuzz_loaders.py", description="Damaged files for every loader.")
    parser.add_argument("--rounds", type=int, default=3000, help="damaged files for each loader (default: 3,000)")
    parser.add_argument("--output", type=Path, default=campaigns.FILE, help="where the record goes (default: tests/campaigns.json)")
    options = parser.parse_args(words)
    print(f"fuzz: {options.rounds:,} damaged files for each loader, about {options.rounds / 300:.0f} min", flush=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_fuzz.py"]
    done = subprocess.run([*command, f"--fuzz-rounds={options.rounds}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    if done.returncode == 0:
        sources = [f"gptfast/{name}.py" for name in SOURCES] + ["tests/test_fuzz.py"]
        facts = {"command": f"python -P tests/fuzz_loaders.py --rounds {options.rounds}", "rounds": options.rounds, **counts}
        campaigns.write("fuzz loaders", facts, sources, options.output)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
