"""The least time that operators can take on a GPU, as a Markdown table: `python scripts/roofline.py [--gpu H100]`.

Operations are those of the chunked form in chunks of 64, bytes those of each input, output and gradient once: see
`work` in `operator_cases.py`. Whichever of the two takes longer is the bound; no kernel can be faster.
"""

from __future__ import annotations

import argparse

import torch
from operator_cases import CASES, draw, work

# Dense bfloat16 operations a second and bytes a second, from the data sheets.
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "B200": (2250e12, 8.0e12)}
BATCH, TIME = 8, 4096


def rows(gpu: str) -> list[str]:
    """One row an operator, bfloat16, batch 8 of 4,096 tokens."""
    rate, bandwidth = GPUS[gpu]
    lines = [
        f"| operator | GFLOP | MB | bound on {gpu}, us | by |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        operations, moved = (BATCH * amount for amount in work(case, draw(case, TIME, torch.bfloat16)))
        seconds = {"tensor cores": operations / rate, "memory": moved / bandwidth}
        bound = max(seconds, key=lambda name: seconds[name])
        lines.append(
            f"| {case.name} | {operations / 1e9:.0f} | {moved / 1e6:.0f} | {seconds[bound] * 1e6:.0f} | {bound} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    print("\n".join(rows(parser.parse_args().gpu)))


if __name__ == "__main__":
    main()
