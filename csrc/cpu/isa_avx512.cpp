#define VISATTN_ISA avx512
#include "isa.h"

namespace visattn::cpu {
extern const Engine engine_avx512;
const Engine engine_avx512{VISATTN_ISA::plan, VISATTN_ISA::run};
}  // namespace visattn::cpu
