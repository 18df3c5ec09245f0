"""Hints for common CUDA that the emulator does not support, in place of the errors of g++.

The emulator supports the CUDA that NVRTC compiles without headers, except for the features of this table.
"""

import re

from minilm.kernels.emulator.fault import lines_of, source_line

COMMENT = re.compile(r"//.*|/\*.*?\*/")
ERROR = re.compile(r"^([^\s:]+):(\d+):(?:\d+:)? (?:fatal )?error: ", re.MULTILINE)

# (pattern of a line; name of the feature; advice)
FEATURES = [(re.compile(pattern), name, advice) for pattern, name, advice in (
    (r'#\s*include\s*("(?:tensor|segments)\.cuh")', "#include {}",
     "give the text to minilm.kernels.launch.with_headers first"),
    (r'#\s*include\s*([<"][^>"]*[>"])', "#include {}",
     "no header is available, as with NVRTC; remove the line: CUDA's own functions need none"),
    (r"\b(cooperative_groups|cg::\w+|this_thread_block)", "{}",
     "cooperative groups; use __syncthreads(), __syncwarp() and the shuffles with a mask"),
    (r"\b(nvcuda|wmma|mma_sync)\b", "{}", "tensor cores; use mma and ldmatrix4 of kernels/tensor.cuh"),
    (r"\b(__half2?|__nv_bfloat162?|nv_bfloat16|__float2half\w*|__half2float|__h(?:add|mul|fma)2?)\b", "{}",
     "16-bit floats; use float, or bf16 of kernels/tensor.cuh"),
    (r"(?:^|[;{(,<]|\bconst\b)\s*(half2?)\s*[*&]*\s*\w", "{}", "16-bit floats; use float"),
    (r"\b(asm)\b", "{}", "inline PTX; use the function of CUDA C, or of kernels/tensor.cuh, for that instruction"),
    (r"(<<<)", "a launch {}...>>>", "host code; give the grid and the block on the command line or to the launch"),
    (r"\b(cuda[A-Z]\w+|int main)\b", "{}", "host code; the file holds kernels alone"),
    (r"\b(std|cuda|thrust|cub)::", "{}::", "no C++ library is available, as with NVRTC; write the operation out"),
    (r"\b(tex[123]D\w*|surf[123]D\w*|cudaTextureObject_t)\b", "{}", "textures and surfaces; read a global array"),
    (r"\b(u?int[13]|float[13]|double[13]|u?char[1-4]|u?short[1-4]|longlong[1-4])\b", "{}",
     "vectors are float2, float4, double2, double4, int2, int4, uint2 and uint4"),
    (r"\b(clock(?:64)?|__nanosleep|globaltimer\w*)\b", "{}", "clocks; the emulator measures no time"),
    (r"\b(__activemask)\b", "{}", "it tells which lanes happen to run together; name the lanes in the mask"),
    (r"\b(__match_\w+_sync|__reduce_\w+_sync)\b", "{}", "a warp operation of newer devices; use shuffles or a ballot"),
    (r"\b(__shfl(?:_up|_down|_xor)?|__ballot|__any|__all)\s*\(", "{}",
     "it names no lanes; use the function with _sync and a mask"),
    (r"\b(__managed__|malloc(?=\s*\()|free(?=\s*\())", "{}", "allocation on the device; pass an array as an argument"),
    (r"\b(INFINITY|NAN|M_PI|FLT_MAX|DBL_MAX|u?int(?:8|16|32|64)_t)\b", "{}",
     "it comes from a header, and none is available, as with NVRTC; write the number or the type out"),
)]


def hints(code: str, log: str) -> list[str]:
    """Lines "file:line: not supported by the emulator: name (advice)" for a text that g++ could not compile.

    There is one line for each unsupported feature of the text; none if the first error in the log of g++ has another
    cause.
    """
    errors = ERROR.findall(log)
    if errors and not _feature(source_line(code, errors[0][0], int(errors[0][1]))):
        return []
    if not errors and "instruction" not in log:         # the assembler's error for inline PTX names no line
        return []
    found = {}
    for file, number, line in lines_of(code):
        if file == "tensor.cuh":                        # its PTX is for a device
            continue
        if feature := _feature(line):
            found.setdefault(feature, f"{file}:{number}: not supported by the emulator: {feature}")
    return list(found.values())


def _feature(line):
    """The first unsupported feature in a line, as "name (advice)"; None if there is none."""
    line = COMMENT.sub("", line)
    for pattern, name, advice in FEATURES:
        if match := pattern.search(line):
            return f"{name.format(match[1])} ({advice.format(match[1])})"
    return None
