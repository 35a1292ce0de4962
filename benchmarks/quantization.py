"""Quantization beside its peers: ``python benchmarks/quantization.py int8 [...]`` and ``weights [...]``; without either, both.

int8: integers without training, see `quantizing.integers`. weights: few bits beside float activations, see `quantizing.weights`.
"""

import sys

from quantizing import integers, weights


def main() -> int:
    """The command."""
    kinds = {"int8": integers.main, "weights": weights.main}
    chosen, rest = (sys.argv[1:2], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in kinds else (list(kinds), sys.argv[1:])
    return max(kinds[kind](rest) for kind in chosen)


if __name__ == "__main__":
    sys.exit(main())
