#include "tables.cuh"

namespace mek {

// Hands out aligned pieces of the workspace, or only counts them.
class Pieces {
  public:
    explicit Pieces(void *workspace) : base_(static_cast<char *>(workspace)) {}

    template <typename T>
    void take(T *&piece, int64_t count) {
        if (base_) piece = reinterpret_cast<T *>(base_ + bytes_);
        bytes_ += ceil_div(count * (int64_t)sizeof(T), kWorkspaceAlignment) * kWorkspaceAlignment;
    }
    int64_t bytes() const { return bytes_; }

  private:
    char *base_;
    int64_t bytes_ = 0;
};

static void take_axis(Pieces &pieces, AxisTable &axis, int64_t in, int64_t out) {
    axis.in = (int)in;
    axis.out = (int)out;
    pieces.take(axis.low, out);
    pieces.take(axis.high, out);
    pieces.take(axis.weight_low, out);
    pieces.take(axis.weight_high, out);
    pieces.take(axis.first, in);
    pieces.take(axis.end, in);
    pieces.take(axis.column_sums, in);
}

int64_t lay_out(const Volumes &v, int64_t rows, bool slabs, void *workspace, Tables *tables) {
    Pieces pieces(workspace);
    Tables here = {};
    here.volumes = v;
    take_axis(pieces, here.frames, v.frames_in, v.frames_out);
    take_axis(pieces, here.height, v.height_in, v.height_out);
    take_axis(pieces, here.width, v.width_in, v.width_out);
    pieces.take(here.row_scales, rows);
    if (slabs) pieces.take(here.slabs, resident_blocks(rows) * slab_size(v));
    if (tables) *tables = here;
    return pieces.bytes();
}

__device__ __forceinline__ void fill_axis(const AxisTable &axis, int64_t index) {
    if (index < axis.out) {
        const Tap one = tap(index, axis.in, axis.out);
        axis.low[index] = (int)one.low;
        axis.high[index] = (int)one.high;
        axis.weight_low[index] = (float)one.weight_low;
        axis.weight_high[index] = (float)one.weight_high;
    }
    if (index < axis.in) {
        const Reach outputs = reach(index, axis.in, axis.out);
        axis.first[index] = (int)outputs.first;
        axis.end[index] = (int)outputs.end;
        axis.column_sums[index] = column_sum(index, axis.in, axis.out);
    }
}

__global__ void fill_axes(Tables tables) {
    const int64_t index = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    fill_axis(tables.frames, index);
    fill_axis(tables.height, index);
    fill_axis(tables.width, index);
}

int32_t fill_tables(const char *function, const Tables &tables, void *stream) {
    const Volumes &v = tables.volumes;
    const int64_t longest = max64(max64(max64(v.frames_in, v.frames_out), max64(v.height_in, v.height_out)),
                                  max64(v.width_in, v.width_out));
    MEK_LAUNCH_OR_RETURN(function, fill_axes, (unsigned)ceil_div(longest, kThreads), kThreads, stream, tables);
    return MEK_OK;
}

}  // namespace mek
