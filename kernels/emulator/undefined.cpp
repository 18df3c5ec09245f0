// Undefined behaviour: g++ -fsanitize=bounds,shift,... puts a check before each operation that can have it, and calls
// one of these functions when the check fails. g++ passes arguments; only the last function uses one.
#include "runtime.h"

namespace emulator {
struct Checked { const char* file; uint32_t line, column; const void* type; uint8_t log2_alignment, kind; };

[[noreturn]] static void undefined(const char* what, const void* place) {
    fault(place, nullptr, "undefined behaviour: %s", what);
}
}

extern "C" {
#define EMULATOR_UNDEFINED(name, what)                                                     \
    void __ubsan_handle_##name(void*) {                                                    \
        if (emulator::current) emulator::undefined(what, __builtin_return_address(0));     \
    }
EMULATOR_UNDEFINED(out_of_bounds, "an index outside of its array")
EMULATOR_UNDEFINED(shift_out_of_bounds, "a shift by more bits than there are, or of a negative number")
EMULATOR_UNDEFINED(add_overflow, "a sum that does not fit its type")
EMULATOR_UNDEFINED(sub_overflow, "a difference that does not fit its type")
EMULATOR_UNDEFINED(mul_overflow, "a product that does not fit its type")
EMULATOR_UNDEFINED(negate_overflow, "a negated number that does not fit its type")
EMULATOR_UNDEFINED(divrem_overflow, "a division by zero, or of the smallest number by -1")
EMULATOR_UNDEFINED(float_cast_overflow, "a float that does not fit the integer it is converted to")

void __ubsan_handle_type_mismatch_v1(emulator::Checked* checked, size_t address) {
    if (!emulator::current) return;
    const void* place = __builtin_return_address(0);
    size_t alignment = size_t(1) << checked->log2_alignment;
    if (!address) emulator::undefined("a null pointer is used", place);
    if (address % alignment)
        emulator::fault(place, nullptr, "misaligned: uses an address that is not a multiple of %zu", alignment);
    emulator::undefined("an address outside of the variable from which it was computed", place);
}
}
