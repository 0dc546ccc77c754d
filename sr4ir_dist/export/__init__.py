"""Networks of a checkpoint for people without this package: safetensors with JSON, and ONNX."""
