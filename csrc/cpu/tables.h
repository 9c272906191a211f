// Owns the tables of one resampling for the length of a call.
#ifndef MEK_TABLES_H
#define MEK_TABLES_H

#include <vector>

#include "kernels.h"

namespace mek {

class ResampleStorage {
  public:
    explicit ResampleStorage(const Volumes &volumes);
    ResampleStorage(const ResampleStorage &) = delete;
    ResampleStorage &operator=(const ResampleStorage &) = delete;
    const ResampleTables &tables() const { return tables_; }

  private:
    struct Axis {
        std::vector<int32_t> indices;
        std::vector<float> weights;
        std::vector<double> column_sums;
    };
    static AxisTable fill(Axis &axis, int64_t in, int64_t out);

    Axis axes_[3];
    std::vector<double> column_sums_;
    ResampleTables tables_;
};

}  // namespace mek
#endif
