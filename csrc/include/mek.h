/* C interface of the mekernels native libraries.
 *
 * libmek_cpu exports the functions without a prefix, libmek_cuda those that start with mek_cuda_, and
 * both export the four of the first section.  Every function that can fail returns a MEK_* status; the
 * message of the last failure on the calling thread is read with mek_last_error().  All arrays are
 * dense, row-major and caller-owned.  Sizes are counted in elements.  No function keeps a pointer after
 * it returns (CUDA: after its work on the stream is done), and a function that returns anything other
 * than MEK_OK has launched no work that writes its outputs.
 */
#ifndef MEK_H
#define MEK_H

#include <stdint.h>

#if defined(__GNUC__)
#define MEK_API __attribute__((visibility("default")))
#else
#define MEK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a signature, a constant or the meaning of an argument changes. */
#define MEK_ABI_VERSION 1

enum {
    MEK_OK = 0,
    MEK_INVALID_ARGUMENT = 1, /* null, misaligned, out of range, on the wrong device */
    MEK_UNSUPPORTED = 2,      /* valid, but this build or machine cannot do it */
    MEK_OUT_OF_MEMORY = 3,
    MEK_DEVICE_ERROR = 4, /* the CUDA runtime refused a call */
    MEK_INTERNAL = 5
};

enum { MEK_FLOAT32 = 0, MEK_FLOAT16 = 1, MEK_BFLOAT16 = 2 };

/* ---- both libraries ---------------------------------------------------------------------------- */

MEK_API int32_t mek_abi_version(void);
/* Message of the last failure on this thread, "" if there was none; valid until the next call. */
MEK_API const char *mek_last_error(void);
/* "MEK_OK" and so on; "unknown status" for a number that is none. */
MEK_API const char *mek_status_name(int32_t status);
/* Compiler and its version, for diagnostics. */
MEK_API const char *mek_compiler(void);

/* ---- CPU --------------------------------------------------------------------------------------- */

/* Vector code in use: "baseline", "avx2" or "avx512". */
MEK_API const char *mek_cpu_level(void);
/* Choose the vector code for the whole process; NULL or "auto" takes the widest this machine runs. */
MEK_API int32_t mek_cpu_set_level(const char *name);

/* threads: the most threads a call may use, 0 = every core this process may run on.  The result does
 * not depend on it. */

/* diagonal (heads, frames, frames, positions), mean_attention (heads), square_sum (heads)
 * -> dfc, tcs, dsr (heads).  A NaN among a head's inputs makes the scores that depend on it NaN. */
MEK_API int32_t mek_motion_scores(const float *diagonal, const float *mean_attention, const float *square_sum,
                                  int64_t heads, int64_t frames, int64_t positions, float *dfc, float *tcs,
                                  float *dsr, int32_t threads);

/* text_attention (tokens, frames * positions), any dtype -> scores (tokens). */
MEK_API int32_t mek_token_motion_scores(const void *text_attention, int32_t dtype, int64_t tokens,
                                        int64_t frames, int64_t positions, float *scores, int32_t threads);

/* Rows are volumes (frames, height, width) laid out flat.  Trilinear with half-pixel centres; normalize
 * != 0 then scales each row to sum to one, a row that sums to zero becomes zero and has no gradient.
 * maps (rows, volume in) -> resampled (rows, volume out), sums (rows; null if not wanted): what each row
 * was divided by, 1 without normalize */
MEK_API int32_t mek_resample_rows(const float *maps, int64_t rows, int64_t frames_in, int64_t height_in,
                                  int64_t width_in, int64_t frames_out, int64_t height_out, int64_t width_out,
                                  int32_t normalize, float *resampled, float *sums, int32_t threads);
/* grad_resampled (rows, volume out), maps (rows, volume in; null unless normalize) -> grad_maps */
MEK_API int32_t mek_resample_rows_backward(const float *grad_resampled, const float *maps, int64_t rows,
                                           int64_t frames_in, int64_t height_in, int64_t width_in,
                                           int64_t frames_out, int64_t height_out, int64_t width_out,
                                           int32_t normalize, float *grad_maps, int32_t threads);

/* row_mask (rows) of bytes, or null for all: a row whose byte is 0 is not read, its norm and gradient are
 * zero.  student (rows, columns), teacher (rows, columns) of any dtype -> norms (rows) of the difference */
MEK_API int32_t mek_row_l2(const float *student, const void *teacher, int32_t teacher_dtype,
                           const uint8_t *row_mask, int64_t rows, int64_t columns, float *norms,
                           int32_t threads);
/* norms (rows) as returned, grad_norms (rows) -> grad_student; a zero difference has no gradient */
MEK_API int32_t mek_row_l2_backward(const float *student, const void *teacher, int32_t teacher_dtype,
                                    const uint8_t *row_mask, const float *norms, const float *grad_norms,
                                    int64_t rows, int64_t columns, float *grad_student, int32_t threads);

/* L2 distance of mek_resample_rows(maps) and the teacher's rows (rows, volume out), and its gradient,
 * without the resampled map.  normalize and normalize_teacher != 0: rows scaled to sum to one.
 * -> norms (rows), row_gradient (rows, volume in; null if not wanted) = d norms[r] / d maps[r] */
MEK_API int32_t mek_align(const float *maps, const void *teacher, int32_t teacher_dtype,
                          const uint8_t *row_mask, int64_t rows, int64_t frames_in, int64_t height_in,
                          int64_t width_in, int64_t frames_out, int64_t height_out, int64_t width_out,
                          int32_t normalize, int32_t normalize_teacher, float *norms, float *row_gradient,
                          int32_t threads);
/* row_gradient (rows, columns), grad_norms (rows) -> grad_maps = grad_norms[r] * row_gradient[r]; grad_maps
 * may be row_gradient itself */
MEK_API int32_t mek_align_backward(const float *row_gradient, const float *grad_norms, int64_t rows,
                                   int64_t columns, float *grad_maps, int32_t threads);

/* ---- CUDA -------------------------------------------------------------------------------------- */

/* device: CUDA ordinal that owns every array; stream: a cudaStream_t of it.  Nothing is allocated and
 * nothing waits for the device.  workspace: device memory of at least the size that the function's
 * _workspace companion reports, aligned to 256 bytes; may be reused once the stream has passed. */

MEK_API int32_t mek_cuda_device_count(int32_t *count);

MEK_API int32_t mek_cuda_motion_scores_workspace(int64_t heads, int64_t frames, int64_t positions,
                                                 int64_t *bytes);
MEK_API int32_t mek_cuda_motion_scores(const float *diagonal, const float *mean_attention,
                                       const float *square_sum, int64_t heads, int64_t frames,
                                       int64_t positions, float *dfc, float *tcs, float *dsr, void *workspace,
                                       int64_t workspace_bytes, int32_t device, void *stream);

/* Arguments as on the CPU, scalars on the host. */

MEK_API int32_t mek_cuda_token_motion_scores_workspace(int64_t tokens, int64_t frames, int64_t positions,
                                                       int64_t *bytes);
MEK_API int32_t mek_cuda_token_motion_scores(const void *text_attention, int32_t dtype, int64_t tokens,
                                             int64_t frames, int64_t positions, float *scores,
                                             void *workspace, int64_t workspace_bytes, int32_t device,
                                             void *stream);

MEK_API int32_t mek_cuda_resample_rows_workspace(int64_t rows, int64_t frames_in, int64_t height_in,
                                                 int64_t width_in, int64_t frames_out, int64_t height_out,
                                                 int64_t width_out, int64_t *bytes);
MEK_API int32_t mek_cuda_resample_rows(const float *maps, int64_t rows, int64_t frames_in,
                                       int64_t height_in, int64_t width_in, int64_t frames_out,
                                       int64_t height_out, int64_t width_out, int32_t normalize,
                                       float *resampled, float *sums, void *workspace,
                                       int64_t workspace_bytes, int32_t device, void *stream);

MEK_API int32_t mek_cuda_resample_rows_backward_workspace(int64_t rows, int64_t frames_in,
                                                          int64_t height_in, int64_t width_in,
                                                          int64_t frames_out, int64_t height_out,
                                                          int64_t width_out, int64_t *bytes);
MEK_API int32_t mek_cuda_resample_rows_backward(const float *grad_resampled, const float *maps,
                                                int64_t rows, int64_t frames_in, int64_t height_in,
                                                int64_t width_in, int64_t frames_out, int64_t height_out,
                                                int64_t width_out, int32_t normalize, float *grad_maps,
                                                void *workspace, int64_t workspace_bytes, int32_t device,
                                                void *stream);

MEK_API int32_t mek_cuda_row_l2(const float *student, const void *teacher, int32_t teacher_dtype,
                                const uint8_t *row_mask, int64_t rows, int64_t columns, float *norms,
                                int32_t device, void *stream);

MEK_API int32_t mek_cuda_row_l2_backward(const float *student, const void *teacher, int32_t teacher_dtype,
                                         const uint8_t *row_mask, const float *norms,
                                         const float *grad_norms, int64_t rows, int64_t columns,
                                         float *grad_student, int32_t device, void *stream);

MEK_API int32_t mek_cuda_align_workspace(int64_t rows, int64_t frames_in, int64_t height_in,
                                         int64_t width_in, int64_t frames_out, int64_t height_out,
                                         int64_t width_out, int64_t *bytes);
MEK_API int32_t mek_cuda_align(const float *maps, const void *teacher, int32_t teacher_dtype,
                               const uint8_t *row_mask, int64_t rows, int64_t frames_in, int64_t height_in,
                               int64_t width_in, int64_t frames_out, int64_t height_out, int64_t width_out,
                               int32_t normalize, int32_t normalize_teacher, float *norms,
                               float *row_gradient, void *workspace, int64_t workspace_bytes,
                               int32_t device, void *stream);

MEK_API int32_t mek_cuda_align_backward(const float *row_gradient, const float *grad_norms, int64_t rows,
                                        int64_t columns, float *grad_maps, int32_t device, void *stream);

#ifdef __cplusplus
}
#endif
#endif
