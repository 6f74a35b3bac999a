// Which cell runs a call; see cuda.h.
#include "cuda.h"

namespace visattn::cuda {

Kind kind_of(const Call& call) {
  for (int term = 0; term < kVectorTerms; ++term)
    if (call.has_vector(VectorTerm(term))) return Kind::kVectors;
  if (call.bias.data || call.key_bias.data) return Kind::kBias;
  const Problem& p = call.problem;
  for (int part = 0; part < parts(p.pattern); ++part) {
    const Part of = part_of(p.pattern, part, p.queries, p.keys);
    if (of.near() || of.others) return Kind::kMasked;
  }
  return Kind::kPlain;
}

namespace {

// Whether rows of `width` numbers of a map can be copied 16 bytes at a time. Strides of what there is but one of count
// as well: a stride that is never taken is rarely odd.
bool copies(const Map& m, int number) {
  const int64_t vector = 16 / number;
  return m.channel == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.batch % vector == 0 &&
         m.y % vector == 0 && m.x % vector == 0 && m.head % vector == 0;
}

}  // namespace

Chosen choose(const Call& call, Pass pass, Numbers numbers) {
  const Problem& p = call.problem;
  const int number = numbers == Numbers::kFloat32 || numbers == Numbers::kTf32 ? 4 : 2;
  const Entry* found = nullptr;
  const Kind kind = kind_of(call);
  for (const CellTable* table = cells(numbers, pass); *table; ++table)
    for (const Entry* e = (*table)(); e->launch; ++e) {
      const bool fits = pass == Pass::kDelta || (e->d == p.head_dim && e->dv == p.value_dim && e->kind >= kind);
      if (fits && (!found || e->kind < found->kind)) found = e;
    }
  Chosen chosen{found ? found->launch : nullptr, {}};
  if (!found || pass == Pass::kDelta) return chosen;
  chosen.plan = cut_of(call, pass);
  lay_out(chosen.plan, call, pass, number, found->d, found->dv, found->kind);
  const Map* const rows[4] = {pass == Pass::kKeys ? &call.k : &call.q, pass == Pass::kKeys ? &call.v : &call.grad_out,
                              pass == Pass::kKeys ? &call.q : &call.k, pass == Pass::kKeys ? &call.grad_out : &call.v};
  for (int i = 0; i < 4; ++i) chosen.plan.vector[i] = copies(*rows[i], number);
  return chosen;
}

}  // namespace visattn::cuda
