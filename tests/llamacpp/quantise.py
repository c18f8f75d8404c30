"""Quantises a GGUF with ggml's own function, as llama.cpp's ``llama-quantize`` does, which no package of PyPI has.

usage: quantise.py LIBRARY IN.gguf OUT.gguf q8_0|q4_k

Matrices whose rows can be divided into the type's blocks are quantised, others stay as they are.
"""

import ctypes
import sys

import gguf
import numpy as np


def main() -> None:
    library, source, target, name = sys.argv[1:]
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    chunk = ctypes.CDLL(library).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    quantised = 0
    for tensor in reader.tensors:
        values = np.asarray(tensor.data)
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32 or values.ndim < 2 or values.shape[-1] % block:
            writer.add_tensor(tensor.name, values, raw_dtype=tensor.tensor_type)
            continue
        values = np.ascontiguousarray(values, dtype=np.float32)
        out = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
        rows, width = values.size // values.shape[-1], values.shape[-1]
        written = chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, width, None)
        assert written == out.nbytes, (tensor.name, written, out.nbytes)
        writer.add_tensor(tensor.name, out, raw_dtype=kind)
        quantised += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(quantised)


if __name__ == "__main__":
    main()
