// Causal attention and its gradients by the matrix unit of Intel's processors (AMX), a head of a sequence at a time:
//
//     p = softmax(scale * q @ k.T), each query over the keys up to its own,     mixed = p @ v
//
// from bfloat16, with sums, softmax and what is between products in float32. By plain products each of these steps passes
// over all probabilities in memory, and over those of keys that come later, which are zero. Here blocks of 32 queries by
// 32 keys stay in the processor's own caches, those above the diagonal are never made, and of the probabilities nothing
// is kept but the logarithm of each row's sum (as in FlashAttention, arXiv 2205.14135): the gradients make them again.
//
// With g the gradient of `mixed`, and u = g @ v.T, ds = p * (u - rowsum(p * u)) * scale; the gradients of q, k and v are
// ds @ k, ds.T @ q and p.T @ g. rowsum(g * mixed) would be the same sum, were `mixed` not rounded. Query heads of a group
// share a key head, whose gradients are the sums over the group.

#include <omp.h>

#include <cmath>
#include <limits>

#include "tiles.h"

using namespace limbeck;

namespace {

// [batch, heads, T, d] in any order of the first three axes; strides in numbers, 1 for the last.
struct Heads {
  bf16* data;
  int64_t batch, head, row;
  Matrix of(int64_t b, int64_t h, int64_t rows, int64_t columns) const {
    return {data + b * batch + h * head, row, rows, columns};
  }
};

struct Shape {
  int64_t batch, heads, key_heads, length, width;
  float scale;
};

enum class As { ROWS, TRANSPOSED_ROWS, PAIRS, TRANSPOSED_PAIRS };

// 32 x 32 of a matrix in order: as a first factor, rows or columns of it as rows; as a second one, with what is summed
// over down its rows, or along them.
void pack(const Matrix& m, int64_t row, int64_t column, As as, bf16* to) {
  __m512i left[16], right[16];
  if (as == As::ROWS || as == As::TRANSPOSED_PAIRS) {
    for (int i = 0; i < 16; i++) left[i] = row_of(m, row + i, column), right[i] = row_of(m, row + 16 + i, column);
  } else {
    in_pairs(m, row, column, left, right);
  }
  if (as == As::TRANSPOSED_ROWS || as == As::TRANSPOSED_PAIRS) {
    transpose(left);
    transpose(right);
  }
  store(to, left, right);
}

// All of a matrix, [block of rows][block of columns], or the other way round where rows are what is summed over.
void pack_all(const Matrix& m, As as, bf16* to) {
  const int64_t down = sides(m.rows), across = sides(m.columns);
  const bool over_rows = as == As::PAIRS || as == As::TRANSPOSED_ROWS;
  for (int64_t r = 0; r < down; r++)
    for (int64_t c = 0; c < across; c++)
      pack(m, r * SIDE, c * SIDE, as, to + (over_rows ? c * down + r : r * across + c) * PAIR);
}

// exp, to two units in the last place: 2^n times a polynomial of what is left, |f| <= ln(2) / 2. Below -87: about 0.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Which of 32 keys from `key` on a query attends to.
__mmask32 seen(int64_t query, int64_t key, int64_t length) {
  const int64_t n = std::min(query + 1, length) - key;
  return query >= length || n <= 0 ? 0 : n >= SIDE ? 0xFFFFFFFFu : (1u << n) - 1;
}

__m512i narrowed(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Row i of a block's sums, its 32 numbers.
const float* row_of_sums(const float* sums, int64_t i) { return sums + i / 16 * 512 + i % 16 * 16; }

// Two rows of 32 numbers, in pairs, into a second factor.
void put_pairs(bf16* block, int64_t pair, __m512i even, __m512i odd) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_store_si512(block + pair * SIDE, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_store_si512(block + TILE + pair * SIDE, _mm512_permutex2var_epi16(even, high, odd));
}

// sums = first @ second over `tiles`.
void product(const bf16* first, const bf16* second, int64_t tiles, float* sums) {
  clear_sums();
  multiply(first, second, tiles);
  store_sums(sums);
}

// A block's sums times a factor for each row, in bfloat16, to where they belong in a matrix.
void put_rows(const float* sums, const float* factors, const Matrix& to, int64_t row, int64_t column) {
  const int64_t there = std::min(SIDE, to.columns - column);
  const __mmask32 mask = there >= SIDE ? 0xFFFFFFFFu : (1u << there) - 1;
  for (int64_t i = 0; i < std::min(SIDE, to.rows - row); i++) {
    const float* from = row_of_sums(sums, i);
    const __m512 factor = _mm512_set1_ps(factors ? factors[i] : 1.0f);
    const __m512 left = _mm512_mul_ps(_mm512_load_ps(from), factor);
    const __m512 right = _mm512_mul_ps(_mm512_load_ps(from + 256), factor);
    _mm512_mask_storeu_epi16(const_cast<bf16*>(to.data) + (row + i) * to.stride + column, mask, narrowed(left, right));
  }
}

// A block's sums, its columns as rows of the matrix.
void put_columns(const float* sums, const Matrix& to, int64_t row, int64_t column) {
  __m512i tile[4][16];
  for (int t = 0; t < 4; t++) {
    for (int i = 0; i < 16; i++) tile[t][i] = _mm512_load_si512(sums + t * 256 + i * 16);
    transpose(tile[t]);
  }
  alignas(64) float turned[PAIR];
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < 16; i++) _mm512_store_si512(turned + (t % 2 * 2 + t / 2) * 256 + i * 16, tile[t][i]);
  put_rows(turned, nullptr, to, row, column);
}

// A thread's memory, handed out in pieces.
class Room {
 public:
  explicit Room(void* data) : at_(static_cast<char*>(data)) {}
  template <class T>
  T* of(int64_t numbers) {
    T* const here = reinterpret_cast<T*>(at_);
    at_ += (numbers * sizeof(T) + 63) / 64 * 64;
    return here;
  }

 private:
  char* at_;
};

int64_t room_for(const Shape& s, bool back) {
  const int64_t rows = sides(s.length), across = sides(s.width), all = rows * across;
  const int64_t forward = 2 * (3 * all + rows) + 4 * (rows + 1);
  const int64_t backward = 2 * (7 * all + 2 * rows * rows + rows) + 4 * (2 * all + 2 * rows + 1);
  return (back ? backward : forward) * PAIR;
}

// One key head of one sequence, with the query heads that share it.
void attend(const Shape& s, int64_t b, int64_t kv, const Heads& q, const Heads& k, const Heads& v, const Heads& mixed,
            float* log_sums, void* memory) {
  const int64_t rows = sides(s.length), across = sides(s.width), group = s.heads / s.key_heads;
  Room room(memory);
  bf16* const keys = room.of<bf16>(rows * across * PAIR);
  bf16* const values = room.of<bf16>(rows * across * PAIR);
  bf16* const queries = room.of<bf16>(rows * across * PAIR);
  bf16* const shares = room.of<bf16>(rows * PAIR);
  float* const scores = room.of<float>(rows * PAIR);
  float* const sums = room.of<float>(PAIR);
  pack_all(k.of(b, kv, s.length, s.width), As::TRANSPOSED_PAIRS, keys);
  pack_all(v.of(b, kv, s.length, s.width), As::PAIRS, values);
  const __m512 scale = _mm512_set1_ps(s.scale), lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
    pack_all(q.of(b, h, s.length, s.width), As::ROWS, queries);
    const Matrix to = mixed.of(b, h, s.length, s.width);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c <= r; c++)
        product(queries + r * across * PAIR, keys + c * across * PAIR, across, scores + c * PAIR);
      alignas(64) float factors[SIDE];
      for (int64_t i = 0; i < SIDE; i++) {
        const int64_t query = r * SIDE + i, half = i / 16;
        __m512 most = lowest;
        for (int64_t c = 0; c <= r; c++) {
          const __mmask32 mask = seen(query, c * SIDE, s.length);
          const float* row = row_of_sums(scores + c * PAIR, i);
          most = _mm512_mask_max_ps(most, static_cast<__mmask16>(mask), most, _mm512_load_ps(row));
          most = _mm512_mask_max_ps(most, static_cast<__mmask16>(mask >> 16), most, _mm512_load_ps(row + 256));
        }
        const float top = query < s.length ? _mm512_reduce_max_ps(most) * s.scale : 0.0f;
        const __m512 less = _mm512_set1_ps(-top);
        __m512 total = _mm512_setzero_ps();
        for (int64_t c = 0; c <= r; c++) {
          const __mmask32 mask = seen(query, c * SIDE, s.length);
          const float* row = row_of_sums(scores + c * PAIR, i);
          const __m512 left = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask),
                                                  exponential(_mm512_fmadd_ps(_mm512_load_ps(row), scale, less)));
          const __m512 right = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16),
                                                   exponential(_mm512_fmadd_ps(_mm512_load_ps(row + 256), scale, less)));
          total = _mm512_add_ps(total, _mm512_add_ps(left, right));
          _mm512_store_si512(shares + c * PAIR + half * TILE + i % 16 * SIDE, narrowed(left, right));
        }
        const float sum = _mm512_reduce_add_ps(total);
        factors[i] = query < s.length ? 1 / sum : 0.0f;
        if (query < s.length) log_sums[(b * s.heads + h) * s.length + query] = top + std::log(sum);
      }
      for (int64_t c = 0; c < across; c++) {
        product(shares, values + c * rows * PAIR, r + 1, sums);
        put_rows(sums, factors, to, r * SIDE, c * SIDE);
      }
    }
  }
}

// The gradients of what `attend` computes, `grad_*` in the order of q, k, v.
void attend_back(const Shape& s, int64_t b, int64_t kv, const Heads& q, const Heads& k, const Heads& v,
                 const float* log_sums, const Heads& g, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v,
                 void* memory) {
  const int64_t rows = sides(s.length), across = sides(s.width), all = rows * across * PAIR;
  const int64_t group = s.heads / s.key_heads;
  Room room(memory);
  bf16 *const keys = room.of<bf16>(all), *const values = room.of<bf16>(all), *const keys_down = room.of<bf16>(all);
  bf16 *const queries = room.of<bf16>(all), *const queries_down = room.of<bf16>(all);
  bf16 *const grads = room.of<bf16>(all), *const grads_down = room.of<bf16>(all);
  bf16 *const shares = room.of<bf16>(rows * rows * PAIR), *const slopes = room.of<bf16>(rows * rows * PAIR);
  bf16* const slopes_across = room.of<bf16>(rows * PAIR);
  float *const sums_k = room.of<float>(all), *const sums_v = room.of<float>(all);
  float *const scores = room.of<float>(rows * PAIR), *const pulls = room.of<float>(rows * PAIR);
  float* const sums = room.of<float>(PAIR);
  pack_all(k.of(b, kv, s.length, s.width), As::TRANSPOSED_PAIRS, keys);
  pack_all(v.of(b, kv, s.length, s.width), As::TRANSPOSED_PAIRS, values);
  pack_all(k.of(b, kv, s.length, s.width), As::PAIRS, keys_down);
  const __m512 scale = _mm512_set1_ps(s.scale);
  for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
    const Matrix Q = q.of(b, h, s.length, s.width), G = g.of(b, h, s.length, s.width);
    pack_all(Q, As::ROWS, queries);
    pack_all(Q, As::TRANSPOSED_ROWS, queries_down);
    pack_all(G, As::ROWS, grads);
    pack_all(G, As::TRANSPOSED_ROWS, grads_down);
    const float* const logs = log_sums + (b * s.heads + h) * s.length;
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c <= r; c++) {
        product(queries + r * across * PAIR, keys + c * across * PAIR, across, scores + c * PAIR);
        product(grads + r * across * PAIR, values + c * across * PAIR, across, pulls + c * PAIR);
      }
      for (int64_t pair = 0; pair < 16; pair++) {
        __m512 deltas[2];
        for (int64_t odd = 0; odd < 2; odd++) {
          const int64_t i = 2 * pair + odd, query = r * SIDE + i;
          const __m512 less = _mm512_set1_ps(query < s.length ? -logs[query] : 0.0f);
          __m512 delta = _mm512_setzero_ps();
          for (int64_t c = 0; c <= r; c++) {
            const __mmask32 mask = seen(query, c * SIDE, s.length);
            for (int right = 0; right < 2; right++) {
              float* const score = scores + c * PAIR + i / 16 * 512 + i % 16 * 16 + 256 * right;
              const __m512 pull = _mm512_load_ps(row_of_sums(pulls + c * PAIR, i) + 256 * right);
              const __m512 p = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16 * right),
                                                   exponential(_mm512_fmadd_ps(_mm512_load_ps(score), scale, less)));
              delta = _mm512_fmadd_ps(p, pull, delta);
              _mm512_store_ps(score, p);
            }
          }
          deltas[odd] = _mm512_set1_ps(_mm512_reduce_add_ps(delta));
        }
        for (int64_t c = 0; c <= r; c++) {
          __m512i share_rows[2], slope_rows[2];
          for (int64_t odd = 0; odd < 2; odd++) {
            const int64_t i = 2 * pair + odd;
            const float *const share = row_of_sums(scores + c * PAIR, i), *const pull = row_of_sums(pulls + c * PAIR, i);
            __m512 p[2], ds[2];
            for (int right = 0; right < 2; right++) {
              p[right] = _mm512_load_ps(share + 256 * right);
              const __m512 pulled = _mm512_sub_ps(_mm512_load_ps(pull + 256 * right), deltas[odd]);
              ds[right] = _mm512_mul_ps(_mm512_mul_ps(p[right], pulled), scale);
            }
            share_rows[odd] = narrowed(p[0], p[1]);
            slope_rows[odd] = narrowed(ds[0], ds[1]);
            _mm512_store_si512(slopes_across + c * PAIR + i / 16 * TILE + i % 16 * SIDE, slope_rows[odd]);
          }
          // Second factors over queries: those of one block of keys stand one after the other.
          put_pairs(shares + (c * rows + r) * PAIR, pair, share_rows[0], share_rows[1]);
          put_pairs(slopes + (c * rows + r) * PAIR, pair, slope_rows[0], slope_rows[1]);
        }
      }
      for (int64_t c = 0; c < across; c++) {
        product(slopes_across, keys_down + c * rows * PAIR, r + 1, sums);
        put_rows(sums, nullptr, grad_q.of(b, h, s.length, s.width), r * SIDE, c * SIDE);
      }
    }
    for (int64_t c = 0; c < rows; c++)
      for (int64_t d = 0; d < across; d++) {
        const auto add = [&](const bf16* first, const bf16* second, float* to) {
          if (h > kv * group)
            load_sums(to);
          else
            clear_sums();
          multiply(first + (d * rows + c) * PAIR, second + (c * rows + c) * PAIR, rows - c);
          store_sums(to);
        };
        add(grads_down, shares, sums_v + (c * across + d) * PAIR);
        add(queries_down, slopes, sums_k + (c * across + d) * PAIR);
      }
  }
  for (int64_t c = 0; c < rows; c++)
    for (int64_t d = 0; d < across; d++) {
      put_columns(sums_k + (c * across + d) * PAIR, grad_k.of(b, kv, s.length, s.width), c * SIDE, d * SIDE);
      put_columns(sums_v + (c * across + d) * PAIR, grad_v.of(b, kv, s.length, s.width), c * SIDE, d * SIDE);
    }
}

template <class Work>
int on_all(const Shape& s, bool back, int threads, const Work& work) {
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    static const Configuration configuration;
    thread_local Buffer kept;
    _tile_loadconfig(&configuration);
    void* const memory = kept.of(room_for(s, back));
    failed |= !memory;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < s.batch * s.key_heads; n++)
      if (memory) work(n / s.key_heads, n % s.key_heads, memory);
    _tile_release();
  }
  return failed;
}

}  // namespace

extern "C" {

// What the head of this file says. `log_sums` [batch, heads, length] is written. 0, or 1 where memory was wanting.
int limbeck_attend(const Shape* s, const Heads* q, const Heads* k, const Heads* v, const Heads* mixed, float* log_sums,
                   int threads) {
  return on_all(*s, false, threads, [&](int64_t b, int64_t kv, void* memory) {
    attend(*s, b, kv, *q, *k, *v, *mixed, log_sums, memory);
  });
}

int limbeck_attend_back(const Shape* s, const Heads* q, const Heads* k, const Heads* v, const float* log_sums,
                        const Heads* g, const Heads* grad_q, const Heads* grad_k, const Heads* grad_v, int threads) {
  return on_all(*s, true, threads, [&](int64_t b, int64_t kv, void* memory) {
    attend_back(*s, b, kv, *q, *k, *v, log_sums, *g, *grad_q, *grad_k, *grad_v, memory);
  });
}
}
