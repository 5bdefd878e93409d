// What both kernels of this directory are made of: tiles of Intel's matrix unit (AMX), and how matrices in memory are
// brought into the order that the unit reads.
//
// A tile of the unit holds 16 rows of 64 bytes. Four of its eight tiles are a block of 32 x 32 sums in float32; two hold
// 32 rows of the first factor over 32 numbers of what is summed over, two the second factor, 32 columns over the same.
// The product is that of instruction TDPBF16PS (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2):
// the first factor stands in rows, the second in pairs, the number of the next row beside each.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace limbeck {

using bf16 = uint16_t;

constexpr int64_t SIDE = 32;       // rows and columns of a block, and of what is summed over in a tile
constexpr int64_t TILE = 16 * 32;  // numbers of bfloat16 in a tile; half as many of float32
constexpr int64_t PAIR = 2 * TILE; // two tiles: 32 x 32 of bfloat16; as many of float32 are a block's sums

struct Matrix {
  const bf16* data;
  int64_t stride, rows, columns;
};

// Memory that a thread keeps for its next product.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  void* of(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      const size_t whole = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, whole);
      size_ = data_ ? whole : 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// All eight tiles at their full size.
struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};
  Configuration() {
    for (int t = 0; t < 8; t++) bytes_a_row[t] = 64, rows[t] = 16;
  }
};

inline int64_t sides(int64_t n) { return (n + SIDE - 1) / SIDE; }

// 32 numbers of a row; zeros for those beyond the matrix.
inline __m512i row_of(const Matrix& m, int64_t row, int64_t column) {
  if (row >= m.rows) return _mm512_setzero_si512();
  const int64_t there = m.columns - column;
  const bf16* from = m.data + row * m.stride + column;
  return there >= SIDE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << there) - 1, from);
}

// 32 rows by 32 columns: [pair of rows, column, row of the pair], the first 16 columns and the others.
inline void in_pairs(const Matrix& m, int64_t row, int64_t column, __m512i left[16], __m512i right[16]) {
  // Unpacking works in quarters of 8 columns; this puts them side by side again.
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int i = 0; i < 16; i++) {
    const __m512i even = row_of(m, row + 2 * i, column), odd = row_of(m, row + 2 * i + 1, column);
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    left[i] = _mm512_permutex2var_epi64(low, first, high);
    right[i] = _mm512_permutex2var_epi64(low, second, high);
  }
}

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int h = 0; h < 16; h += 8)
    for (int i = 0; i < 4; i++) {
      t[h + i] = _mm512_shuffle_i32x4(r[h + i], r[h + i + 4], 0x88);
      t[h + i + 4] = _mm512_shuffle_i32x4(r[h + i], r[h + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

inline void store(bf16* to, const __m512i left[16], const __m512i right[16]) {
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * SIDE, left[i]);
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + TILE + i * SIDE, right[i]);
}

inline void load_sums(const float* from) {
  _tile_loadd(0, from, 64);
  _tile_loadd(1, from + 256, 64);
  _tile_loadd(2, from + 512, 64);
  _tile_loadd(3, from + 768, 64);
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_sums(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  _tile_stored(2, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

// Adds products of `tiles` pairs of tiles each. Those of the first factor pass by without a claim on the first cache.
inline void multiply(const bf16* first, const bf16* second, int64_t tiles) {
  for (int64_t t = 0; t < tiles; t++, first += PAIR, second += PAIR) {
    _tile_stream_loadd(4, first, 64);
    _tile_loadd(6, second, 64);
    _tile_loadd(7, second + TILE, 64);
    _tile_stream_loadd(5, first + TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

}  // namespace limbeck
