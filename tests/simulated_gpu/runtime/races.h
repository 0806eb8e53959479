// Races between queues: two entries that touch the same bytes, one of them writing, without an order between them.
#pragma once

#include "streams.h"

namespace simulated_gpu {

// To be called with what an entry touched, in the order in which entries run. Throws Fault that names both.
void look_for_races(const Queue& queue, const Entry& entry, const std::vector<Touched>& touched);
void forget_accesses(std::uint64_t begin, std::uint64_t end);  // of memory that is gone
void forget_all_accesses();

}  // namespace simulated_gpu
