#define VISATTN_ISA plain
#include "isa.h"

namespace visattn::cpu {
extern const Engine engine_plain;
const Engine engine_plain{VISATTN_ISA::plan, VISATTN_ISA::run};
}  // namespace visattn::cpu
