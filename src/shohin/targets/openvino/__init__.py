"""OpenVINO on the CPU; it reads the same ONNX files, with grids placed by its own rules."""
