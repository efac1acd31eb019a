"""Models as graphs without Python: torch.export of prefill and decode step, and ONNX that onnxruntime runs token by token."""

from .decoding import DecodeStep, Prefill, empty_state, state_names
from .onnx_step import OnnxDecoder, save_onnx_step

__all__ = ["DecodeStep", "OnnxDecoder", "Prefill", "empty_state", "save_onnx_step", "state_names"]
