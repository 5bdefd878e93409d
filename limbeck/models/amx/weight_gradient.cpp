// The product that gives a weight's gradient, by the matrix unit of Intel's processors (AMX):
//
//     out[O, I] = dy[N, O].T @ x[N, I]          or out += ..., in float32 from bfloat16
//
// What oneDNN does for it runs at half the rate of its other products and ends in bfloat16. Here dy and x are brought
// into the order that the unit reads, and sums stay in float32 to the end.
//
// Columns of dy become rows of tiles, and rows of x stand in pairs (tiles.h). x is brought into order as a whole, by all
// threads; each thread has rows of `out` of its own, for which it brings columns of dy into order, as many at a time as
// its own cache holds with their sums. Of N, 512 are taken at a time: 32 columns of x then stay in the first cache while
// those of dy pass by, which is what lets the unit work without a break.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

using namespace limbeck;

namespace {

constexpr int64_t PART = 512 / SIDE;  // of N at a time, in tiles
constexpr int64_t BLOCKS = 8;         // of dy's columns at a time, in blocks: 256 KiB with PART of N
constexpr int64_t PANELS = 24;        // of x's columns at a time, in blocks: 768 KiB of sums with BLOCKS

// A block's sums into their place, past the caches where that can be: nobody reads them soon.
void put(const float* sums, float* to, int64_t stride, int64_t rows, int64_t columns, bool add) {
  const bool past = !add && columns >= SIDE && reinterpret_cast<uintptr_t>(to) % 64 == 0 && stride % 16 == 0;
  const auto some = [](int64_t n) -> __mmask16 { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; };
  const __mmask16 in_left = some(columns), in_right = some(columns - 16);
  for (int64_t i = 0; i < std::min(rows, SIDE); i++, to += stride) {
    const float* from = sums + i / 16 * 512 + i % 16 * 16;
    __m512 left = _mm512_load_ps(from), right = _mm512_load_ps(from + 256);
    if (past) {
      _mm512_stream_ps(to, left);
      _mm512_stream_ps(to + 16, right);
      continue;
    }
    if (add) {
      left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(in_left, to));
      right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(in_right, to + 16));
    }
    _mm512_mask_storeu_ps(to, in_left, left);
    _mm512_mask_storeu_ps(to + 16, in_right, right);
  }
}

// BLOCKS of dy's columns from block `top`, and PART of N from tile `from`, in order.
void pack_dy(const Matrix& dy, int64_t from, int64_t tiles, int64_t top, int64_t blocks, bf16* to) {
  for (int64_t t = 0; t < tiles; t++) {
    // The rows after these are asked for meanwhile: they lie far apart, which the processor does not foresee.
    for (int64_t i = 0; i < SIDE; i++) {
      const bf16* next = dy.data + std::min((from + t + 1) * SIDE + i, dy.rows - 1) * dy.stride;
      for (int64_t m = 0; m < blocks; m++) _mm_prefetch(next + (top + m) * SIDE, _MM_HINT_T1);
    }
    for (int64_t m = 0; m < blocks; m++) {
      __m512i left[16], right[16];
      in_pairs(dy, (from + t) * SIDE, (top + m) * SIDE, left, right);
      transpose(left);
      transpose(right);
      store(to + (m * tiles + t) * PAIR, left, right);
    }
  }
}

// One thread's rows of `out`, blocks `first` to `last`. `packed_x` are parts of N, each a row of panels.
bool rows_of_out(const Matrix& dy, const Matrix& x, const bf16* packed_x, float* out, int64_t stride, bool add,
                 int64_t first, int64_t last) {
  thread_local Buffer kept_dy, kept_sums;
  const int64_t tiles = sides(x.rows), panels = sides(x.columns);
  bf16* const packed_dy = static_cast<bf16*>(kept_dy.of(BLOCKS * PART * PAIR * sizeof(bf16)));
  float* const kept = static_cast<float*>(kept_sums.of(BLOCKS * std::min(PANELS, panels) * PAIR * sizeof(float)));
  if (!packed_dy || !kept) return false;
  for (int64_t top = first; top < last; top += BLOCKS)
    for (int64_t left = 0; left < panels; left += PANELS) {
      const int64_t blocks = std::min(BLOCKS, last - top), right = std::min(left + PANELS, panels);
      for (int64_t from = 0; from < tiles; from += PART) {
        const int64_t here = std::min(PART, tiles - from);
        pack_dy(dy, from, here, top, blocks, packed_dy);
        for (int64_t p = left; p < right; p++)
          for (int64_t m = 0; m < blocks; m++) {
            float* const sums = kept + ((p - left) * blocks + m) * PAIR;
            if (from > 0)
              load_sums(sums);
            else
              clear_sums();
            multiply(packed_dy + m * here * PAIR, packed_x + (from * panels + p * here) * PAIR, here);
            store_sums(sums);
            if (from + here < tiles) continue;
            const int64_t row = (top + m) * SIDE, column = p * SIDE;
            put(sums, out + row * stride + column, stride, dy.columns - row, x.columns - column, add);
          }
      }
    }
  return true;
}

}  // namespace

extern "C" {

// Asks the system for the unit's registers, which are large and not a process's by themselves. 0 once it has them.
int limbeck_ask_for_amx() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 1 : 0;
}

// What the head of this file says; strides in numbers. 0, or 1 where memory was wanting: `out` then holds anything.
int limbeck_weight_gradient(int64_t O, int64_t I, int64_t N, const void* dy, int64_t dy_stride, const void* x,
                            int64_t x_stride, void* out, int64_t out_stride, int add, int threads) {
  thread_local Buffer kept;
  const Matrix DY{static_cast<const bf16*>(dy), dy_stride, N, O}, X{static_cast<const bf16*>(x), x_stride, N, I};
  const int64_t tiles = sides(N), panels = sides(I);
  bf16* const packed_x = static_cast<bf16*>(kept.of(panels * tiles * PAIR * sizeof(bf16)));
  if (!packed_x) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    static const Configuration configuration;
    _tile_loadconfig(&configuration);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t from = t / PART * PART, here = std::min(PART, tiles - from);
      for (int64_t p = 0; p < panels; p++) {
        __m512i left[16], right[16];
        in_pairs(X, t * SIDE, p * SIDE, left, right);
        store(packed_x + (from * panels + p * here + t - from) * PAIR, left, right);
      }
    }
    const int64_t of = omp_get_num_threads(), me = omp_get_thread_num(), blocks = sides(O);
    failed |= !rows_of_out(DY, X, packed_x, static_cast<float*>(out), out_stride, add != 0, blocks * me / of,
                           blocks * (me + 1) / of);
    _tile_release();
    _mm_sfence();
  }
  return failed;
}
}
