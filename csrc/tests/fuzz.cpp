// Hostile calls of the C interface: sizes, pointers, dtypes, devices and workspaces that do not fit, and
// contents of any bits.  A call must return a status; success must write every output, and failure must
// leave a message and every output alone.  Build with -fsanitize=fuzzer for libFuzzer, or with
// -DMEK_FUZZ_MAIN for a driver of its own: fuzz [cases] [seed].
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "host_device.h"
#include "mek.h"

// Choices read off the fuzzer's bytes; zeros once they have run out.
class Choices {
  public:
    Choices(const uint8_t *data, size_t size) : data_(data), size_(size) {}
    int below(int limit) {
        const int value = size_ ? *data_ : 0;
        if (size_) {
            ++data_;
            --size_;
        }
        return value % limit;
    }
    bool one_in(int n) { return below(n) == n - 1; }

  private:
    const uint8_t *data_;
    size_t size_;
};

constexpr uint32_t kPoison = 0x7fabcdefu;  // a NaN no kernel makes

// Exact-sized heap memory, so that the sanitizer sees one byte too many.
struct Buffer {
    std::unique_ptr<char[]> memory;
    int64_t bytes;
    bool output;
};

class Call {
  public:
    Call(Choices &choices, bool cuda) : choices_(choices), cuda_(cuda) { cuda_on_host_clear(); }

    // Small, unless a hostile value was chosen; then the call must fail.
    int64_t size(int64_t most, int64_t limit) {
        const int64_t value = 1 + choices_.below((int)most);
        if (!choices_.one_in(40)) return value;
        const int64_t hostile[] = {0, -1, limit + 1, std::numeric_limits<int64_t>::max(),
                                   std::numeric_limits<int64_t>::min()};
        must_fail_ = true;
        return hostile[choices_.below(5)];
    }

    int32_t dtype() {
        if (!choices_.one_in(30)) return choices_.below(3);
        must_fail_ = true;
        return choices_.one_in(2) ? 3 : -7;
    }

    int32_t device() {
        if (!cuda_ || !choices_.one_in(30)) return 0;
        must_fail_ = true;
        const int32_t wrong[] = {-1, 1, 2, 1 << 30};
        return wrong[choices_.below(4)];
    }

    enum Kind { kInput, kOutput, kOptionalInput, kOptionalOutput };

    template <typename T>
    T *array(int64_t count, int64_t width, Kind kind) {
        const bool optional = kind == kOptionalInput || kind == kOptionalOutput;
        if (choices_.one_in(optional ? 2 : 60)) {
            must_fail_ |= !optional;
            return nullptr;
        }
        const int64_t bytes = count * width;
        Buffer buffer{std::unique_ptr<char[]>(new char[bytes]), bytes,
                      kind == kOutput || kind == kOptionalOutput};
        char *address = buffer.memory.get();
        fill(buffer, width);
        buffers_.push_back(std::move(buffer));
        if (cuda_) {
            const bool elsewhere = choices_.one_in(60);  // on the other device, or on none
            must_fail_ |= elsewhere;
            if (!elsewhere || choices_.one_in(2)) cuda_on_host_register(address, bytes, elsewhere);
        }
        if (width == 1 || !choices_.one_in(60)) return reinterpret_cast<T *>(address);
        must_fail_ = true;
        return reinterpret_cast<T *>(address + 1);
    }
    float *input(int64_t count) { return array<float>(count, 4, kInput); }
    float *output(int64_t count) { return array<float>(count, 4, kOutput); }
    float *optional_output(int64_t count) { return array<float>(count, 4, kOptionalOutput); }
    void *any_float(int64_t count, int32_t dtype) {
        return array<void>(count, dtype == MEK_FLOAT32 ? 4 : 2, kInput);
    }
    uint8_t *mask(int64_t count) { return array<uint8_t>(count, 1, kOptionalInput); }

    // The size asked for is right; the memory may not be.
    void *workspace(int32_t status, const int64_t &reported, int64_t *bytes) {
        must_fail_ |= status != MEK_OK;
        const int64_t needed = status == MEK_OK ? reported : 256;
        const int64_t room = (needed + 255) / 256 * 256;
        workspace_.reset(static_cast<char *>(aligned_alloc(256, (size_t)(room + 256))));
        memset(workspace_.get(), 0xff, (size_t)(room + 256));
        cuda_on_host_register(workspace_.get(), room + 256, 0);
        *bytes = needed;
        if (!choices_.one_in(20)) return workspace_.get();
        must_fail_ = true;
        switch (choices_.below(4)) {
            case 0: return nullptr;
            case 1: return workspace_.get() + 128;
            case 2: *bytes = needed - 1; return workspace_.get();
            default: *bytes = std::numeric_limits<int64_t>::min(); return workspace_.get();
        }
    }

    int32_t threads() { return choices_.one_in(8) ? -5 : choices_.below(4); }
    int32_t flag() { return choices_.below(3) - 1; }
    bool cuda() const { return cuda_; }
    void must_fail() { must_fail_ = true; }

    void check(const char *function, int32_t status) const {
        const bool failed = status != MEK_OK;
        if (status < MEK_OK || status > MEK_INTERNAL) stop(function, "a status that is none");
        if (failed != must_fail_) stop(function, failed ? "refused a good call" : "took a bad call");
        if (failed && !*mek_last_error()) stop(function, "no message");
        for (const Buffer &buffer : buffers_)
            if (buffer.output)
                for (int64_t i = 0; i < buffer.bytes; i += 4) {
                    uint32_t bits;
                    memcpy(&bits, buffer.memory.get() + i, 4);
                    if ((bits == kPoison) != failed)
                        stop(function, failed ? "wrote in spite of failing" : "left an output unwritten");
                }
    }

  private:
    void fill(Buffer &buffer, int64_t width) {
        if (buffer.output) {
            for (int64_t i = 0; i + 4 <= buffer.bytes; i += 4) memcpy(buffer.memory.get() + i, &kPoison, 4);
            return;
        }
        const uint32_t special[] = {0x7fc00000u, 0x7f800000u, 0xff800000u, 0x00000001u, 0x7f7fffffu, 0x80000000u};
        Random random(1 + (uint64_t)choices_.below(256));
        const int kind = choices_.below(4);
        for (int64_t i = 0; i < buffer.bytes; i += width) {
            uint32_t bits = (uint32_t)random.next();
            const float ordinary = random.uniform();
            if (width == 4 && kind != 3) memcpy(&bits, &ordinary, 4);
            if (kind == 2 && random.below(4) == 0) bits = special[random.below(6)];
            if (kind == 1) bits = 0;
            memcpy(buffer.memory.get() + i, &bits, (size_t)width);
        }
    }

    [[noreturn]] void stop(const char *function, const char *what) const {
        fprintf(stderr, "%s: %s (%s)\n", function, what, mek_last_error());
        abort();
    }

    struct Free {
        void operator()(char *pointer) const { free(pointer); }
    };
    Choices &choices_;
    bool cuda_, must_fail_ = false;
    std::vector<Buffer> buffers_;
    std::unique_ptr<char, Free> workspace_;
};

constexpr int64_t kSizes = int64_t(1) << 31, kAxis = 1 << 24, kFrames = 1 << 15;

// Elements of an array; one where the sizes are hostile, for then none may be touched.
static int64_t product(std::initializer_list<int64_t> sizes) {
    int64_t result = 1;
    for (int64_t size : sizes) {
        if (size < 1 || size > 4096) return 1;
        result *= size;
    }
    return result;
}

static void fuzz_motion_scores(Call &call, Choices &choices) {
    int64_t h = call.size(3, kSizes), f = call.size(7, kFrames), p = call.size(40, kSizes);
    if (choices.one_in(60)) {  // allowed one by one, but not together
        h = p = kSizes;
        call.must_fail();
    }
    const float *diagonal = call.input(product({h, f, f, p}));
    const float *tau = call.input(product({h})), *squares = call.input(product({h}));
    float *dfc = call.output(product({h})), *tcs = call.output(product({h})), *dsr = call.output(product({h}));
    if (!call.cuda())
        return call.check("mek_motion_scores", mek_motion_scores(diagonal, tau, squares, h, f, p, dfc, tcs, dsr,
                                                                 call.threads()));
    int64_t needed = 0, bytes = 0;
    void *workspace = call.workspace(mek_cuda_motion_scores_workspace(h, f, p, &needed), needed, &bytes);
    call.check("mek_cuda_motion_scores", mek_cuda_motion_scores(diagonal, tau, squares, h, f, p, dfc, tcs, dsr,
                                                                workspace, bytes, call.device(), nullptr));
}

static void fuzz_token_motion_scores(Call &call, Choices &choices) {
    int64_t t = call.size(4, kSizes), f = call.size(5, kSizes), p = call.size(40, kSizes);
    if (choices.one_in(60)) {
        t = f = p = kSizes;
        call.must_fail();
    }
    const int32_t dtype = call.dtype();
    const void *attention = call.any_float(product({t, f, p}), dtype);
    float *scores = call.output(product({t}));
    if (!call.cuda())
        return call.check("mek_token_motion_scores",
                          mek_token_motion_scores(attention, dtype, t, f, p, scores, call.threads()));
    int64_t needed = 0, bytes = 0;
    void *workspace = call.workspace(mek_cuda_token_motion_scores_workspace(t, f, p, &needed), needed, &bytes);
    call.check("mek_cuda_token_motion_scores",
               mek_cuda_token_motion_scores(attention, dtype, t, f, p, scores, workspace, bytes, call.device(),
                                            nullptr));
}

struct Grids {
    int64_t rows, in[3], out[3];
    int64_t elements_in, elements_out;
};

static Grids grids(Call &call, Choices &choices) {
    Grids g;
    g.rows = call.size(3, kSizes);
    for (int i = 0; i < 3; ++i) {
        g.in[i] = call.size(i == 2 ? 20 : 5, kAxis);
        g.out[i] = call.size(i == 2 ? 20 : 5, kAxis);
    }
    if (choices.one_in(60)) {
        const int which = choices.below(3);
        if (which == 0) g.in[0] = g.in[1] = kAxis;
        if (which == 1) g.out[1] = g.out[2] = kAxis;
        if (which == 2) g.in[1] = g.out[2] = kAxis;  // small by itself on both sides
        call.must_fail();
    }
    g.elements_in = product({g.rows, g.in[0], g.in[1], g.in[2]});
    g.elements_out = product({g.rows, g.out[0], g.out[1], g.out[2]});
    return g;
}

#define GRIDS(g) g.rows, g.in[0], g.in[1], g.in[2], g.out[0], g.out[1], g.out[2]

static void fuzz_resample_rows(Call &call, Choices &choices) {
    const Grids g = grids(call, choices);
    const int32_t normalize = call.flag();
    const float *maps = call.input(g.elements_in);
    float *resampled = call.output(g.elements_out), *sums = call.optional_output(product({g.rows}));
    if (!call.cuda())
        return call.check("mek_resample_rows",
                          mek_resample_rows(maps, GRIDS(g), normalize, resampled, sums, call.threads()));
    int64_t needed = 0, bytes = 0;
    void *workspace = call.workspace(mek_cuda_resample_rows_workspace(GRIDS(g), &needed), needed, &bytes);
    call.check("mek_cuda_resample_rows", mek_cuda_resample_rows(maps, GRIDS(g), normalize, resampled, sums,
                                                                workspace, bytes, call.device(), nullptr));
}

static void fuzz_resample_rows_backward(Call &call, Choices &choices) {
    const Grids g = grids(call, choices);
    const int32_t normalize = call.flag();
    const float *grad = call.input(g.elements_out), *maps = normalize ? call.input(g.elements_in) : nullptr;
    float *grad_maps = call.output(g.elements_in);
    if (!call.cuda())
        return call.check("mek_resample_rows_backward", mek_resample_rows_backward(grad, maps, GRIDS(g), normalize,
                                                                                   grad_maps, call.threads()));
    int64_t needed = 0, bytes = 0;
    void *workspace = call.workspace(mek_cuda_resample_rows_backward_workspace(GRIDS(g), &needed), needed, &bytes);
    call.check("mek_cuda_resample_rows_backward",
               mek_cuda_resample_rows_backward(grad, maps, GRIDS(g), normalize, grad_maps, workspace, bytes,
                                               call.device(), nullptr));
}

static void fuzz_align(Call &call, Choices &choices) {
    const Grids g = grids(call, choices);
    const int32_t dtype = call.dtype(), normalize = call.flag(), normalize_teacher = call.flag();
    const float *maps = call.input(g.elements_in);
    const void *teacher = call.any_float(g.elements_out, dtype);
    const uint8_t *mask = call.mask(product({g.rows}));
    float *norms = call.output(product({g.rows})), *gradient = call.optional_output(g.elements_in);
    if (!call.cuda())
        return call.check("mek_align", mek_align(maps, teacher, dtype, mask, GRIDS(g), normalize, normalize_teacher,
                                                 norms, gradient, call.threads()));
    int64_t needed = 0, bytes = 0;
    void *workspace = call.workspace(mek_cuda_align_workspace(GRIDS(g), &needed), needed, &bytes);
    call.check("mek_cuda_align", mek_cuda_align(maps, teacher, dtype, mask, GRIDS(g), normalize, normalize_teacher,
                                                norms, gradient, workspace, bytes, call.device(), nullptr));
}

static void fuzz_rows(Call &call, Choices &choices) {
    int64_t rows = call.size(4, kSizes), columns = call.size(50, kSizes);
    if (choices.one_in(60)) {
        rows = columns = kSizes;
        call.must_fail();
    }
    const int64_t elements = product({rows, columns});
    const int which = choices.below(3);
    const float *student = call.input(elements);
    const float *grad_norms = which ? call.input(product({rows})) : nullptr;
    if (which == 2) {
        float *out = call.output(elements);
        return call.cuda() ? call.check("mek_cuda_align_backward",
                                        mek_cuda_align_backward(student, grad_norms, rows, columns, out,
                                                                call.device(), nullptr))
                           : call.check("mek_align_backward", mek_align_backward(student, grad_norms, rows, columns,
                                                                                 out, call.threads()));
    }
    const int32_t dtype = call.dtype();
    const void *teacher = call.any_float(elements, dtype);
    const uint8_t *mask = call.mask(product({rows}));
    if (which == 0) {
        float *norms = call.output(product({rows}));
        return call.cuda() ? call.check("mek_cuda_row_l2",
                                        mek_cuda_row_l2(student, teacher, dtype, mask, rows, columns, norms,
                                                        call.device(), nullptr))
                           : call.check("mek_row_l2", mek_row_l2(student, teacher, dtype, mask, rows, columns,
                                                                 norms, call.threads()));
    }
    const float *norms = call.input(product({rows}));
    float *grad = call.output(elements);
    return call.cuda() ? call.check("mek_cuda_row_l2_backward",
                                    mek_cuda_row_l2_backward(student, teacher, dtype, mask, norms, grad_norms, rows,
                                                             columns, grad, call.device(), nullptr))
                       : call.check("mek_row_l2_backward",
                                    mek_row_l2_backward(student, teacher, dtype, mask, norms, grad_norms, rows,
                                                        columns, grad, call.threads()));
}

static void fuzz_rest(Choices &choices) {
    const char *levels[] = {"baseline", "avx2", "avx512", "auto", nullptr, "avx1024", ""};
    const int32_t status = mek_cpu_set_level(levels[choices.below(7)]);
    if (status != MEK_OK && status != MEK_UNSUPPORTED) abort();
    if (!mek_cpu_level() || !mek_compiler() || mek_abi_version() != MEK_ABI_VERSION) abort();
    if (!mek_status_name(choices.below(256) - 128)) abort();
    int32_t count = 0;
    if (mek_cuda_device_count(&count) != MEK_OK || mek_cuda_device_count(nullptr) != MEK_INVALID_ARGUMENT) abort();
}

static void one_case(Choices &choices) {
    static void (*const functions[])(Call &, Choices &) = {
        fuzz_motion_scores,          fuzz_token_motion_scores, fuzz_resample_rows,
        fuzz_resample_rows_backward, fuzz_align,               fuzz_rows};
    const int which = choices.below(64);
    if (which == 63) return fuzz_rest(choices);
    Call call(choices, choices.one_in(64));  // a block of emulated threads costs a thousand calls
    functions[which % 6](call, choices);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Choices choices(data, size);
    one_case(choices);
    return 0;
}

#if defined(MEK_FUZZ_MAIN)
int main(int count, char **arguments) {
    const long cases = count > 1 ? atol(arguments[1]) : 100000;
    const uint64_t seed = count > 2 ? (uint64_t)atoll(arguments[2]) : 1;
    for (long i = 0; i < cases; ++i) {
        Random random(seed * 1000003 + (uint64_t)i);
        uint8_t data[128];
        for (uint8_t &byte : data) byte = (uint8_t)(random.next() >> 32);
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    printf("fuzz: %ld cases, no failure\n", cases);
    return 0;
}
#endif
