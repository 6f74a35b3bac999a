#define VISATTN_ISA avx512_bf16
#include "isa.h"

namespace visattn::cpu {
extern const Engine engine_avx512_bf16;
const Engine engine_avx512_bf16{VISATTN_ISA::plan, VISATTN_ISA::run};
}  // namespace visattn::cpu
