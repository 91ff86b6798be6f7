"""Models as ONNX files with the solver inside, and training steps as ONNX graphs: build, check against torch, run.

`runtime`, `engine` and `trainer` need onnxruntime and numpy; `graph`, `wrap` and `training` need onnx and numpy,
`precision` all three; `verify`, `cross` and `export` need torch as well. Nothing is imported here, so that a device
pays only for what it uses.
"""
