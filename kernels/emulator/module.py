"""CuPy's RawModule on a machine without a GPU: compiles CUDA C with g++, checks a launch, and runs it.

It is stricter than CuPy. CuPy passes a Python int as 64 bits and a float as a double, whatever the kernel declares;
it checks neither the dtype nor the contiguity of an array; and it launches one block for an empty grid. Such a kernel
computes with wrong bits. Here every argument is compared with the declaration of the kernel.
"""

import ctypes
import functools
import math
import mmap
import os
import re
import subprocess
import threading
from typing import NamedTuple

import numpy as np

from minilm.kernels.emulator import build
from minilm.kernels.emulator.fault import Fault
from minilm.kernels.emulator.running import ORDERS, SHARED_MOST, Launch, note, setting_of_now
from minilm.kernels.emulator.work import ask

STACK_BYTES = 256 << 10                 # of a thread; these three as in runtime.h
MOST_THREADS = 1024                     # of a block
WARP = 32
SHARED_UNASKED = 48 << 10               # bytes of shared memory of a block, by default
MOST_BLOCKS = 2 ** 31 - 1, 65535, 65535
MOST_THREADS_ALONG = 1024, 1024, 64
GAP = 64 << 10                          # bytes between two arguments in a checked launch
# Places that are not the kernel. addr2line has "??" or no name for assembly.
OWN_FILES = {*build.RUNTIME, *build.RUNTIME_HEADERS, *build.KERNEL_HEADERS, "exports", "??", ""}


_lock = threading.Lock()
if hasattr(os, "register_at_fork"):         # a forked child must not wait for a launch of its parent
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class _Buffer(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("element", ctypes.c_size_t),
                ("writable", ctypes.c_int), ("name", ctypes.c_char_p), ("read", ctypes.c_size_t),
                ("written", ctypes.c_size_t)]


class _Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("dynamic", ctypes.c_size_t),
                ("shared_limit", ctypes.c_size_t), ("checked", ctypes.c_int), ("order", ctypes.c_int),
                ("seed", ctypes.c_uint), ("most_steps", ctypes.c_ulonglong), ("most_seconds", ctypes.c_double),
                ("stacks", ctypes.c_void_p), ("buffer_count", ctypes.c_size_t),
                ("buffers", ctypes.POINTER(_Buffer)), ("shared_read", ctypes.c_size_t),
                ("shared_written", ctypes.c_size_t), ("message", ctypes.c_char * 512),
                ("fault_block", ctypes.c_uint * 3), ("fault_thread", ctypes.c_uint * 3),
                ("places", ctypes.c_size_t * 16), ("other_place", ctypes.c_size_t)]


class Parameter(NamedTuple):
    name: str
    dtype: object           # None: a type that a launch cannot pass
    pointer: bool
    writable: bool
    restrict: bool
    bf16: bool


class UnknownKernel(KeyError):
    """The module has no kernel of that name."""

    def __init__(self, name, names):
        self.name = name
        self.names = names
        super().__init__(name)

    def __str__(self):
        known = f"its kernels are {', '.join(self.names)}" if self.names else "it has none"
        return f'the module has no kernel extern "C" __global__ void {self.name}; {known}'


class RawModule:
    """CuPy's RawModule, with the arguments that minilm uses."""

    def __init__(self, *, code, options=()):
        if reason := build.available():
            raise RuntimeError(f"kernels cannot run here: {reason}")
        self.code = code
        self.options = tuple(options)

    def get_function(self, name):
        function = Function(self, name)
        function.compiled(setting_of_now.get().mode)      # raises CompileError now rather than at the launch
        return function


class Function:
    """A kernel. Called as CuPy's: function(grid, block, args, shared_mem=bytes)."""

    def __init__(self, module, name):
        self.module = module
        self.name = name
        self._most_dynamic = SHARED_UNASKED
        self._compiled = {}

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._most_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if not 0 <= size <= SHARED_MOST:
            raise ValueError(f"{self.name}: {size} bytes of shared memory; a device has at most {SHARED_MOST}")
        self._most_dynamic = size

    def compiled(self, mode):
        if mode not in self._compiled:
            path = build.library(self.module.code, self.module.options, mode)
            self._compiled[mode] = Compiled(path, self.name, self.module.code)
        return self._compiled[mode]

    def __call__(self, grid, block, args, *, shared_mem=0):
        setting = setting_of_now.get()
        compiled = self.compiled(setting.mode)
        grid = self._extent("grid", grid, MOST_BLOCKS)
        block = self._extent("block", block, MOST_THREADS_ALONG)
        self._check_shape(compiled, block, shared_mem)
        values, arrays = self._arguments(compiled.parameters, args)
        self._check_overlap(compiled.parameters, arrays)
        with _lock:
            record = compiled.launch(setting, grid, block, values, arrays, shared_mem,
                                     max(SHARED_UNASKED, SHARED_MOST if self._most_dynamic > SHARED_UNASKED else 0))
        note(record)
        ask("launches")

    def _extent(self, what, extent, most):
        if not isinstance(extent, (tuple, list)) or not 1 <= len(extent) <= 3:
            raise TypeError(f"{self.name}: a {what} must be a tuple of 1 to 3 ints, not {extent!r}")
        extent = tuple(map(int, extent)) + (1,) * (3 - len(extent))
        if any(n < 1 for n in extent):
            raise ValueError(f"{self.name}: a {what} of {extent}; each number must be at least one")
        if any(n > m for n, m in zip(extent, most)):
            raise ValueError(f"{self.name}: a {what} of {extent}; CUDA allows at most {most}")
        return extent

    def _check_shape(self, compiled, block, shared_mem):
        threads = math.prod(block)
        if threads > MOST_THREADS:
            raise ValueError(f"{self.name}: {threads} threads a block; CUDA allows at most {MOST_THREADS}")
        if threads % WARP:
            raise ValueError(f"{self.name}: {threads} threads a block; the emulator needs a multiple of {WARP}, whole "
                             "warps")
        if compiled.most_threads and threads > compiled.most_threads:
            raise Fault(f"{threads} threads a block, but its __launch_bounds__ promise at most "
                        f"{compiled.most_threads}", self.name)
        if not 0 <= shared_mem <= self._most_dynamic:
            raise ValueError(f"{self.name}: {shared_mem} bytes of dynamic shared memory, but "
                             f"max_dynamic_shared_size_bytes is {self._most_dynamic}; set it first")

    def _arguments(self, parameters, args):
        """A list of C values (None for arrays), and {index: the NumPy array behind the argument}."""
        if len(args) != len(parameters):
            names = ", ".join(p.name for p in parameters)
            raise TypeError(f"{self.name} takes {len(parameters)} arguments ({names}), not {len(args)}")
        pairs = [self._argument(i, p, a) for i, (p, a) in enumerate(zip(parameters, args))]
        return [value for value, _ in pairs], {i: array for i, (_, array) in enumerate(pairs) if array is not None}

    def _argument(self, i, parameter, value):
        me = f"{self.name}: argument {i} ({parameter.name})"
        if parameter.dtype is None:
            raise TypeError(f"{me} is declared with a type that the emulator cannot pass; declare a number or a "
                            "pointer to numbers")
        if parameter.pointer:
            if not hasattr(value, "__minilm_buffer__"):
                kind = "a NumPy array" if isinstance(value, np.ndarray) else type(value).__name__
                raise TypeError(f"{me} must be an array on the device, but is {kind}")
            array = value.__minilm_buffer__()
            if array.dtype != parameter.dtype:
                declared = "bf16, uint16 on the host" if parameter.bf16 else parameter.dtype
                raise TypeError(f"{me} is an array of {array.dtype}; the kernel declares {declared}")
            if not array.flags.c_contiguous:
                raise TypeError(f"{me} is not contiguous: shape {array.shape}, strides {array.strides}")
            return None, array
        if not isinstance(value, np.generic):
            hint = f"; pass np.{parameter.dtype}(...)" if isinstance(value, (bool, int, float)) else ""
            raise TypeError(f"{me} is declared {parameter.dtype}, but is a {type(value).__name__}{hint}")
        if value.dtype != parameter.dtype:
            raise TypeError(f"{me} is declared {parameter.dtype}, but is a {value.dtype}")
        return ctypes.create_string_buffer(value.tobytes(), value.itemsize), None

    def _check_overlap(self, parameters, arrays):
        spans = [(i, *_span(a)) for i, a in arrays.items() if a.size]
        for n, (i, start, end) in enumerate(spans):
            for j, other_start, other_end in spans[:n]:
                a = parameters[j]
                b = parameters[i]
                overlap = start < other_end and other_start < end
                if overlap and (a.writable or b.writable) and (a.restrict or b.restrict):
                    raise ValueError(f"{self.name}: {a.name} and {b.name} overlap in memory, but the kernel declares "
                                     "with __restrict__ that they do not; pass a copy of one")


class Compiled:
    """A kernel of a loaded library. code: the text of the module, which a Fault quotes."""

    def __init__(self, path, name, code):
        self.path = path
        self.name = name
        self.code = code
        self.library = ctypes.CDLL(str(path))
        try:
            self.run = self.library[f"{name}__launch"]
        except AttributeError:
            raise UnknownKernel(name, build.kernel_names(code)) from None
        codes = ctypes.create_string_buffer(4096)
        self.most_threads = self.library[f"{name}__signature"](codes)
        texts = self.library[f"{name}__parameters"]
        texts.restype = ctypes.c_char_p
        texts = re.split(r",(?![^<]*>)", texts().decode())
        self.parameters = tuple(map(_parameter, codes.value.decode().split(), texts))

    def launch(self, setting, grid, block, values, arrays, shared_mem, shared_limit):
        is_checked = setting.mode == "checked"
        at = _isolated(arrays) if is_checked else arrays
        buffers = (_Buffer * max(1, len(arrays)))(*(
            _Buffer(array.ctypes.data, array.nbytes, array.itemsize, self.parameters[i].writable,
                    self.parameters[i].name.encode()) for i, array in at.items()))
        values = [ctypes.c_void_p(at[i].ctypes.data) if value is None else value for i, value in enumerate(values)]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        random = setting.schedule not in ORDERS
        state = _Launch(grid=grid, block=block, dynamic=shared_mem, shared_limit=shared_limit, checked=is_checked,
                        order=2 if random else ORDERS[setting.schedule], seed=setting.schedule if random else 0,
                        most_steps=setting.steps, most_seconds=0 if setting.mode == "debug" else setting.seconds,
                        stacks=_stacks(), buffer_count=len(arrays), buffers=buffers)
        status = self.run(ctypes.byref(state), pointers)
        if status == 2:
            raise MemoryError(f"{self.name}: the checkers need memory for every number of its arrays, and there is not "
                              "enough; make them smaller")
        if status:
            raise self._fault(state)
        for i, array in at.items():
            if array is not arrays[i] and self.parameters[i].writable:
                arrays[i][...] = array
        moved = {i: (b.read, b.written) for i, b in zip(arrays, buffers)} if is_checked else None
        return Launch(self.name, tuple(p.name for p in self.parameters), grid, block, shared_mem, moved,
                      (state.shared_read, state.shared_written) if is_checked else None)

    def _fault(self, state):
        where = self._lines([place for place in state.places if place])
        other = self._lines([state.other_place] if state.other_place else [])
        what = state.message.decode(errors="replace").replace("@", f"at {other}" if other else "at an unknown line")
        return Fault(what, self.name, where or other, tuple(state.fault_block), tuple(state.fault_thread), other,
                     self.code)

    def _lines(self, places):
        """The innermost line of the source and the line of the kernel that called it, from addr2line; or None."""
        if not places:
            return None
        # A return address points to the next instruction, hence - 1. -a shows the address of each place, and -i the
        # callers of inlined functions: the last is the function itself. One of the runtime is not the kernel.
        result = subprocess.run(["addr2line", "-a", "-i", "-e", str(self.path), *(hex(place - 1) for place in places)],
                                capture_output=True, text=True)
        chains = [[line.rpartition("/")[2].split(" ")[0] for line in chain.splitlines()[1:]]
                  for chain in re.split(r"^(?=0x)", result.stdout, flags=re.M)[1:]]
        lines = [line for chain in chains if _file(chain[-1]) not in build.RUNTIME
                 for line in chain if _file(line) not in OWN_FILES]
        if not lines:
            return None
        return lines[0] if lines[-1] == lines[0] else f"{lines[0]} (called at {lines[-1]})"


def _file(line):
    return line.partition(":")[0]


def _parameter(code, text):
    pointer = code[0] in "cp"
    letter = code[-2]
    size = int(code[-1])
    letters = {"b": "?", "h": "u2"}             # bool; bf16, which NumPy stores as uint16
    dtype = None if letter == "?" else np.dtype(letters.get(letter, f"{letter}{size}"))
    return Parameter(re.findall(r"\w+", text)[-1], dtype, pointer, code[0] == "p", "__restrict" in text, letter == "h")


@functools.lru_cache(maxsize=None)
def _stacks():
    """The address of memory for the stacks of the threads of a block; the lowest page of each stack is protected."""
    memory = mmap.mmap(-1, STACK_BYTES * MOST_THREADS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _stacks.memory = memory
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    for i in range(MOST_THREADS):
        libc.mprotect(ctypes.c_void_p(address + i * STACK_BYTES), mmap.PAGESIZE, 0)
    return address


def _span(array):
    return array.ctypes.data, array.ctypes.data + array.nbytes


def _isolated(arrays):
    """Copies that lie far apart, so that an index beyond the end of one array is not inside another.

    A device aligns an allocation to 256 bytes. A copy keeps the distance of its array from the start of its
    allocation, so an access that is misaligned on a device is misaligned here. Arrays that share memory are not copied.
    """
    spans = {i: _span(array) for i, array in arrays.items()}

    def alone(i):
        return all(j == i or spans[j][1] <= spans[i][0] or spans[i][1] <= spans[j][0] for j in spans)
    memory = np.empty(sum(2 * array.nbytes + GAP + 1024 for array in arrays.values()), np.uint8)
    copies = {}
    end = 0
    for i, array in arrays.items():
        if not alone(i):
            copies[i] = array
            continue
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        start = end + GAP
        start += -(memory.ctypes.data + start) % 256 + (spans[i][0] - root.ctypes.data) % 256
        copies[i] = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
        copies[i][...] = array
        end = start + 2 * array.nbytes
    return copies
