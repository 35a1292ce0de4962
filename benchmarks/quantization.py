"""Quantization beside its peers: ``python benchmarks/quantization.py int8 [...]``, ``weights [...]``, ``language [...]`` and ``qat [...]``; without
any, all.

int8: integers without training, see `quantizing.integers`; without-vnni: the same files on another CPU, see `quantizing.without_vnni`. weights: few bits beside float activations, see `quantizing.weights`;
language: the same for a language model, see `quantizing.language`. qat: 4-bit networks that are trained, see `quantizing.trained`.
"""

import sys

from quantizing import integers, language, trained, weights, without_vnni


def main() -> int:
    """The command."""
    kinds = {
        "int8": integers.main,
        "without-vnni": without_vnni.main,
        "weights": weights.main,
        "language": language.main,
        "qat": trained.main,
    }
    chosen, rest = (sys.argv[1:2], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in kinds else (list(kinds), sys.argv[1:])
    return max(kinds[kind](rest) for kind in chosen)


if __name__ == "__main__":
    sys.exit(main())
