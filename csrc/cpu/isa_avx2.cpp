#define VISATTN_ISA avx2
#include "isa.h"

namespace visattn::cpu {
extern const Engine engine_avx2;
const Engine engine_avx2{VISATTN_ISA::plan, VISATTN_ISA::run};
}  // namespace visattn::cpu
