"""`make test-portable`: the tests that train, as on other processors and with other numbers of threads.

Another instruction set rounds otherwise, and training makes a large difference of the last digit. What a test says of a
trained model must hold in spite of that. Arguments go to pytest: `python tests/portable.py FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

INSTRUCTION_SETS = {
    "torch without vector instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
}
THREADS = (1, 2)
WORKERS = ["-n", "2", "--dist", "worksteal"]
"""As in `make test`. With two threads each they share two cores; threads that wait must then sleep."""


def main(arguments: list[str]) -> int:
    """Runs every configuration, whatever the others say, and returns 1 if one failed."""
    said = []
    for name, setting in INSTRUCTION_SETS.items():
        for threads in THREADS:
            label = f"{name}, {threads} thread{'s' * (threads > 1)}"
            print(f"\n=== {label}", flush=True)
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as compiled:  # what torch has compiled before is for all instructions
                own = {"HOLDFAST_TEST_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": compiled}
                code = subprocess.run(
                    [sys.executable, "-m", "pytest", "-m", "trains", "--quiet", *WORKERS, *arguments],
                    env={**os.environ, **setting, **own, "OMP_WAIT_POLICY": "passive"},
                    check=False,
                ).returncode
            said.append((label, code, time.monotonic() - begin))
    print("\n=== tests that train")
    for label, code, seconds in said:
        outcome = "passed" if code == 0 else f"FAILED (exit code {code})"
        print(f"{label:<45} {outcome} in {seconds / 60:.1f} min")
    return int(any(code for _, code, _ in said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
