"""ONNX files, which several runtimes read: export, grids as Q/DQ pairs, weights of few bits, what a file says of itself."""
