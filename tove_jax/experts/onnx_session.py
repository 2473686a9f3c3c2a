"""ONNX runtime sessions on the host, and inner tensors of an ONNX file as outputs."""

from __future__ import annotations

from typing import Any

from tove_jax.errors import InputError


def protobuf_field(number: int, content: bytes) -> bytes:
    """Returns a length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def with_output(model: bytes, tensor: str) -> bytes:
    """Adds an inner tensor to the outputs of a serialised ONNX model.

    A protobuf parser merges a message field that occurs twice, so a second `graph` (field 7 of
    ModelProto) that holds nothing but one `output` (field 12 of GraphProto, a ValueInfoProto with
    its name in field 1), put after the model's bytes, appends to the first graph's outputs.

    Args:
      model: bytes of an ONNX ModelProto.
      tensor: name of the output of some node of its graph.

    Returns:
      bytes of the model with one output more.
    """
    return model + protobuf_field(7, protobuf_field(12, protobuf_field(1, tensor.encode())))


def open_session(model: bytes, where: str, threads: int = 1, expected: str = "an ONNX model") -> Any:
    """Opens a model for the CPU.

    Args:
      model: bytes of an ONNX ModelProto.
      where: names the model in errors.
      threads: that one batch may use; one, so that several processes of extraction share a machine without
        treading on each other.
      expected: what the model should be, for errors.

    Returns:
      An ``onnxruntime.InferenceSession``.

    Raises:
      InputError: onnxruntime is not installed, `threads` is not positive, or the bytes are no model that it runs.
    """
    if not isinstance(threads, int) or threads < 1:
        raise InputError(f"{where}: threads: expected a positive number, found {threads!r}")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{where}: package onnxruntime is not installed; run `pip install onnxruntime`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Waiting threads sleep instead of spinning, which would take the cores of other processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise InputError(f"{where}: expected {expected}: {str(error).splitlines()[0]}") from error
