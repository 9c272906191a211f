// Work on all cores.  Threads live for one call: a pool would not survive the fork of a data loader.
#ifndef MEK_PARALLEL_H
#define MEK_PARALLEL_H

#include <stdint.h>

#include <functional>

namespace mek {

// Calls work(item, worker) for every item in [0, items), worker in [0, workers).  Items are handed out
// one by one; results must depend on the item alone.
void parallel_for(int64_t items, int workers, const std::function<void(int64_t, int)> &work);

// Workers worth starting: at most `threads` (0 = every core this process may use), at most one an item,
// and one alone where the whole call touches few elements.
int worker_count(int32_t threads, int64_t items, int64_t elements);

// Runs the body of a C function; no exception leaves it.
int32_t guarded(const char *function, const std::function<int32_t()> &body);

}  // namespace mek
#endif
