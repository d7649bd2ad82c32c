"""Models for deployment: ONNX and ``torch.export``."""
