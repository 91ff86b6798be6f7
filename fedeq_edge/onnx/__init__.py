"""Personal models as ONNX files with the solver inside: build, check against torch, run.

`runtime` needs onnxruntime and numpy; `graph` and `wrap` need onnx and numpy; `verify` and `export` need torch as well.
Nothing is imported here, so that a device pays only for what it uses.
"""
