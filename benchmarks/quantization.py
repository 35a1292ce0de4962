"""Quantization beside its peers; so far weights of few bits: ``python benchmarks/quantization.py [--rows NAME...] [--show]``."""

from quantizing.weights import main

if __name__ == "__main__":
    main()
